"""Who finds the active rows: a solver of this package, one of another package, or the user's.

protocol.py says what a solver answers; choose.py picks one; external.py asks other packages (add a solver there).
"""
