"""The arms of the evidence: each a way to choose ranks, by name in `registry.ARMS`.

A new arm is a line there.
"""
