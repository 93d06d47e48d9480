"""What a run is fed, by file, folder or hub id: text data sets, every row of them checked, and
pretrained models with their tokenizers.

Import from `text` and `models`; `columns` serves `text`.
"""
