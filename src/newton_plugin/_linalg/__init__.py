"""Symmetric matrices in every form they are stored in, and their damped inverses."""
