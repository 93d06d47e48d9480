"""The tasks that arms are trained on: text, labels and a metric.

Import `TASKS` from `registry`.
"""
