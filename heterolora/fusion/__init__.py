"""`fuse` and `unfuse`: LoRA layers bound to the group operation, and back.

Import `fuse`, `unfuse` and `FuseReport` from `heterolora`; `decline` says why a layer keeps the
forward of PEFT.
"""
