"""Shortest paths: speed and training. ``python -m benchmarks.shortest_path``."""
