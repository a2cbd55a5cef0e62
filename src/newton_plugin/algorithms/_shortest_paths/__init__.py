"""Shortest paths on grids and graphs: exact, and relaxed."""
