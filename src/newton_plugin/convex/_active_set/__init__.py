"""The solver in torch: a batch of dense quadratic programs by active sets.

solve.py chooses; definite.py solves where Q is definite, by pivoting.py (with gram.py) and dual.py, and judge.py says
whether an answer is one; proximal.py solves where Q is singular.
"""
