"""What torch sees: each operation with its schema, fake tensors and autograd.

`linear`, `add` and `scored` hold one operation each, `call` the arguments they share. Import their
functions from `heterolora.kernels`.
"""
