"""Stochastic bilevel optimizers: one file each, and what they share (optimizer.py)."""
