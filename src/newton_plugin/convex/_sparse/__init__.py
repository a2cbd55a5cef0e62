"""Quadratic programs with sparse matrices: solve.py is the function, system.py the factored optimality system."""
