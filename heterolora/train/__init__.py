"""Training by transformers' Trainer: `run.train`, and the callbacks and trainers it is made of.

Import from `run`, `trainers` and `models`; the other files serve these.
"""
