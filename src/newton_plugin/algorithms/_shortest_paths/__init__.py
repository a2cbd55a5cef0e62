"""Shortest paths, exact on grids and graphs (compiled or in torch) and relaxed on grids (bellman_ford.py)."""
