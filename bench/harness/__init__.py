"""How it is measured: interleaved rounds, parity first, memory, launches, and the result file.

It knows no case; import from its modules.
"""
