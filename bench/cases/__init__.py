"""What is measured: sizes, models, and the variants of a training step that are compared.

`registry` names every case; a new size is a line in `shapes`.
"""
