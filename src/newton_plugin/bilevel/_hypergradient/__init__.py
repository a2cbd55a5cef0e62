"""The hypergradient: its formula (estimate.py), the linear system (solvers.py), calls of the closures (oracle.py)."""
