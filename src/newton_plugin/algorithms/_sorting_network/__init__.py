"""Differentiable sorting networks: the module (network.py), its schedule (layers.py), its comparators (swaps.py)."""
