"""Which path a group takes: what was measured on this device, else `aten`.

`paths` decides, `measured` reads and writes the files in `tuned/`; import from these two.
"""
