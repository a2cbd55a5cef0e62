"""Differentiable sorting networks."""
