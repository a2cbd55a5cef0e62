"""Convex programs as differentiable functions: BPQP.

* ``solve_qp(Q, p, A, b, G, h)``: quadratic programs, in batches, exact, differentiable to any order.
* ``BPQPLayer``: the same as a module.
* ``ConvexLayer(objective, equality, inequality)``: any smooth convex program, written as torch functions.

Each room imports only from rooms before it:

    _status  <-  _system  <-  _active_set, _smooth, _solution  <-  _compiled  <-  _solvers  <-  _sparse  <-  _qp
"""

from newton_plugin.convex._qp.solve_qp import BPQPLayer, solve_qp
from newton_plugin.convex._smooth.layer import ConvexLayer, ConvexSolution
from newton_plugin.convex._solution import QPSolution
from newton_plugin.convex._solvers.protocol import QPSolver
from newton_plugin.convex._status import (
    MissingSolverError,
    NestedForwardError,
    NonUniqueSolutionWarning,
    ProblemFailedError,
    ProblemFailedWarning,
    Status,
)
from newton_plugin.convex._system.problem import Problem

__all__ = [
    "BPQPLayer",
    "ConvexLayer",
    "ConvexSolution",
    "MissingSolverError",
    "NestedForwardError",
    "NonUniqueSolutionWarning",
    "Problem",
    "ProblemFailedError",
    "ProblemFailedWarning",
    "QPSolution",
    "QPSolver",
    "Status",
    "solve_qp",
]
