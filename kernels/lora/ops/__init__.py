"""What torch sees: each operation with its schema, fake tensors and autograd.

`linear`, `add` and `scored` hold one operation each; `call` makes their operands, `autograd` and
`registry` are what they share. Import the operations from `heterolora.kernels`.
"""
