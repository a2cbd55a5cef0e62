"""Quadratic programs with sparse matrices."""
