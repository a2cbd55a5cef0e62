"""The solver compiled by numba: strictly convex quadratic programs, one problem at a time.

qp.py is the entry from Python; it calls two kernels, solve.py and adjoint.py. The other files are parts of them:

    jit  <-  linear, workspace  <-  rows, kkt  <-  pivoting, certify  <-  dual  <-  solve_one  <-  solve
    jit  <-  linear, workspace  <-  kkt  <-  adjoint
"""
