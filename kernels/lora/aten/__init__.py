"""The operations by the library's own matmuls: the path that runs on any device.

`linear` and `score` are called by `ops` alone; `onednn` is a base matmul for some CPUs.
"""
