"""Adapters on disk, in PEFT's own format: written with care and read with suspicion.

Import `save_adapter` and `load_adapter` from `heterolora`.
"""
