"""The `heterolora` command: `main` is the parser, and each other file one command, its options and
what it does; `inputs` is what `search` and `train` share.

Nothing imports from here. `bench` and `verify` are commands too, whose options and code lie with
what they run.
"""
