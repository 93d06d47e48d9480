"""The `heterolora` command: `main` is its entry, `options` what its commands take.

Nothing imports from here.
"""
