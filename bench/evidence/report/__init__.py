"""Statistics, tables and pictures of evidence results; only reads.

Import from its modules.
"""
