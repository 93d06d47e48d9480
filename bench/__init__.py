"""Measures heterolora against its peers: a registry of cases, one harness, results as JSON files.

No speed without correctness: a case whose parity check fails is reported red and is not timed.
"""
