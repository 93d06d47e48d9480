"""One command on a GPU: parity, then the cases, then the tuner, within a given time.

`suite` is that command; the others are its parts.
"""
