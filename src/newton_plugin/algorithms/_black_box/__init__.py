"""Solvers that autograd cannot see through: smoothed, perturbed, with Fenchel-Young losses."""
