"""Budgets of time: what a training step costs with given ranks, and the best ranks within it."""
