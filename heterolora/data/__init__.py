"""Text data from files and the hub: which columns hold it, and batches of tokens.

Import from `text` and `columns`.
"""
