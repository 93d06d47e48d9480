"""Compile every kernel without a GPU, read what came out, and hold it to budgets.

Import from `compile`, `cases` and `budgets`; `python -m heterolora.kernels.aot` is the command.
"""
