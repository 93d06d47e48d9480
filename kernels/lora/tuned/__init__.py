"""What was measured, as data: a file a device (paths, tiles), and the budgets of compiled kernels.

`measured` reads and writes the files of devices; `dispatch` looks paths up in them, `gpu.launch`
tiles.
"""
