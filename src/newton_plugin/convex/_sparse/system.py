r"""The optimality system of one large sparse QP, factored with its sparsity.

    [ Q + dI   C_W' ] [ x   ]   [ -p  ]
    [ C_W      -dI  ] [ y_W ] = [ c_W ]

is quasi-definite for the working rows W and d > 0. So it has a sparse factorisation without pivoting for any convex
Q and any rows, also dependent ones. Steps of iterative refinement remove the effect of d (the proximal-point method;
d is 1e-9 of the scale of Q and C).

W comes from a solver of low accuracy and is repaired by block exchanges as in ``_active_set/pivoting.py``: rows with a
negative multiplier leave and violated rows enter, until the optimality conditions hold. This checks what a solver
claims, except a claim that there is no solution: that is believed if a second solver, where one is installed, agrees.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from newton_plugin._errors import ArgumentError, ArgumentTypeError
from newton_plugin.convex._solvers.external import EXTERNAL, ask, load
from newton_plugin.convex._sparse.scaling import scales
from newton_plugin.convex._status import MissingSolverError, Status

__all__ = ["SparseSystem"]

_SHIFT = 1e-9
_SHIFTS = (_SHIFT, 1e-7, 1e-5)  # in turn, where rows depend on each other and Q has nothing to say
_ROUNDS = 30
_SIGN = 1e-11  # relative: a multiplier or a slack below minus this is negative
_VIOLATION = 1e-11  # relative: allowed at the end, of stationarity and of the rows in force
_AUTOMATIC = ("piqp", "clarabel", "osqp")  # in the order of their measured times
_EXTRA = '"newton-plugin[convex]"'


class SparseSystem:
    """Pattern, values, working rows and factors of one problem: n variables, count rows, the first m equalities.

    Everything inside is in units in which the columns and rows have one size (``scaling.py``).
    """

    def __init__(self, q_index: Tensor, c_index: Tensor, n: int, count: int, m: int) -> None:
        self.q_index, self.c_index, self.n, self.count, self.m = q_index, c_index, n, count, m
        self.numpy = load("numpy", "numpy")
        self.sparse = load("scipy.sparse", _EXTRA)
        self.splu = load("scipy.sparse.linalg", _EXTRA).splu
        self.working = torch.zeros(count, dtype=torch.bool)

    def find(
        self, q: Tensor, p: Tensor, c_values: Tensor, c: Tensor, solver: Any, precision: float
    ) -> tuple[Status, str]:
        """Set the working rows and the factors -> status, the solver's name. Values are used without their graph."""
        np = self.numpy
        entries, linear, values, right = (t.detach().numpy() for t in (q, p, c_values, c))
        finite = all(np.isfinite(part).all() for part in (entries, linear, values, right[: self.m]))
        if not finite or np.isnan(right).any() or (right == -np.inf).any():
            return Status.NOT_FINITE, ""
        Q = self.sparse.csc_matrix((entries, self.q_index.numpy()), (self.n, self.n))
        C = self.sparse.csr_matrix((values, self.c_index.numpy()), (self.count, self.n))
        Q = (0.5 * (Q + Q.T)).tocsc()
        self.columns, self.rows = scales(np, Q, C)
        self.Q, self.C = Q, C
        if (self.columns != 1).any() or (self.rows != 1).any():
            columns, rows = self.sparse.diags(self.columns), self.sparse.diags(self.rows)
            self.Q, self.C = (columns @ Q @ columns).tocsc(), (rows @ C @ columns).tocsr()
        self.p = linear * self.columns
        self.c = np.where(abs(right) < 1e30, right * self.rows, right.clip(-1e30, 1e30))
        self.length = np.sqrt(np.asarray(self.C.multiply(self.C).sum(1)).ravel())
        self.scale = float(abs(self.Q).max()) or 1.0
        self.precision = precision
        if not self._convex():
            return Status.NON_CONVEX, ""
        name, claim, outcome = self._claim(solver)
        if outcome in (Status.INFEASIBLE, Status.UNBOUNDED):
            return outcome, name
        return self._repair(claim | (np.arange(self.count) < self.m)), name

    def _convex(self) -> bool:
        shifted = self.Q + _SHIFT * self.scale * self.sparse.identity(self.n, format="csc")
        try:
            factor = self.splu(shifted.tocsc(), diag_pivot_thresh=0.0, options={"SymmetricMode": True})
        except RuntimeError:  # exactly singular, although shifted: an eigenvalue is negative
            return False
        return bool((factor.U.diagonal() > 0).all())

    def _claim(self, solver: Any) -> tuple[str, Any, Status]:
        """A rough idea of the active rows from another solver."""
        np = self.numpy
        if not isinstance(solver, str):
            raise ArgumentTypeError(
                f"solver for a sparse problem must be a name; got {type(solver).__name__}. Your own solver takes "
                "dense matrices: Q.to_dense()."
            )
        if solver != "auto" and solver not in _AUTOMATIC:
            raise ArgumentError(
                f"solver for a sparse problem must be 'auto', {', '.join(map(repr, _AUTOMATIC))}; got {solver!r}. "
                "Others take dense matrices: Q.to_dense()."
            )
        refused = None
        for name in _AUTOMATIC if solver == "auto" else (solver,):
            try:
                status, x, y = ask(EXTERNAL[name], self.Q, self.p, self.C, self.c, self.m)
            except MissingSolverError:
                if solver != "auto":
                    raise
                continue
            if status == Status.SOLVED:
                slack = (self.c - self.C @ x).clip(0) / self.length.clip(1e-300)
                size = max(float(np.linalg.norm(x)), 1e-12)
                return name, y * self.length * size > slack * self._gradient(x, y), status
            if refused is not None:  # a second solver gives up as well
                break
            refused = name, np.zeros(self.count, bool), status
        return refused or ("pivoting", np.zeros(self.count, bool), Status.SOLVED)

    def _repair(self, working: Any) -> Status:
        """Exchange rows until none is wrong."""
        np = self.numpy
        equality = np.arange(self.count) < self.m
        fewest, patience = self.count + 1, 3
        size = abs(self.C)
        for _ in range(_ROUNDS):
            if not self.factor(working):
                return Status.NOT_CONVERGED
            x, y = self._solve(-self.p[:, None], np.where(working, self.c, 0.0)[:, None])
            x, y = x[:, 0], y[:, 0]
            spread = 1e-3 * np.linalg.norm(x) + 1e-5 * np.linalg.norm(self.p) / self.scale
            terms = (abs(self.c) + size @ abs(x) + self.length * spread).clip(1e-300)
            slack, gradient = (self.c - self.C @ x) / terms, self._gradient(x, y)
            force = y * self.length / gradient
            wrong = (working & ~equality & (force < -_SIGN)) | (~working & (slack < -_SIGN))
            count = int(wrong.sum())
            if not count:
                break
            patience = 3 if count < fewest else patience - 1
            fewest = min(fewest, count)
            if patience < 0:  # Murty: only the last one moves
                wrong[np.flatnonzero(wrong)[:-1]] = False
            working = working ^ wrong
        else:
            return Status.NOT_CONVERGED
        stationary = float(np.linalg.norm(self.Q @ x + self.p + self.C.T @ y)) / gradient
        held = float(abs(slack[working]).max(initial=0.0))
        if stationary > _VIOLATION or held > max(_VIOLATION, 8 * self.precision):
            return Status.NOT_CONVERGED
        weak = working & ~equality & (force <= _SIGN)
        if weak.any():
            working = working & ~weak
            if not self.factor(working):
                return Status.NOT_CONVERGED
        self.working = torch.from_numpy(working)
        return Status.SOLVED

    def _gradient(self, x: Any, y: Any) -> float:
        """The size of the terms of the stationarity condition."""
        norm = self.numpy.linalg.norm
        return max(*(float(norm(t)) for t in (self.Q @ x, self.p, self.C.T @ y)), 1e-300)

    def factor(self, working: Any) -> bool:
        """Factor the shifted system at these rows; false where no shift makes it regular."""
        np = self.numpy
        self.index = np.flatnonzero(working)
        rows = self.C[self.index]
        self.exact = (
            self.sparse.bmat([[self.Q, rows.T], [rows, None]], format="csc") if len(self.index) else self.Q.tocsc()
        )
        heights = (self.length[self.index] ** 2).clip(1e-300) / self.scale
        for shift in _SHIFTS:
            shifts = shift * np.concatenate([np.full(self.n, self.scale), -heights])
            try:
                self.lu = self.splu(
                    (self.exact + self.sparse.diags(shifts, format="csc")).tocsc(),
                    permc_spec="MMD_AT_PLUS_A",
                    diag_pivot_thresh=0.0,
                    options={"SymmetricMode": True},
                )
                return True
            except RuntimeError:  # exactly singular: the shift was lost in the rounding of dependent rows
                continue
        return False

    def solve(self, rx: Any, ry: Any) -> tuple[Any, Any]:
        """``K (x, y_W) = (rx, ry_W)``, y = 0 elsewhere, in the units of the data: (n, r), (K, r) -> the same shapes."""
        columns, rows = self.columns[:, None], self.rows[:, None]
        x, y = self._solve(rx * columns, ry * rows)
        return x * columns, y * rows

    def _solve(self, rx: Any, ry: Any, steps: int = 6) -> tuple[Any, Any]:
        np = self.numpy
        right = np.concatenate([rx, ry[self.index]])
        u = self.lu.solve(right)
        size, zero = abs(right).max(initial=1e-300), not right[self.n :].any()
        for _ in range(steps):
            rest = right - self.exact @ u
            if abs(rest).max(initial=0.0) <= 1e-15 * size and not zero:  # x = 0 may be the answer: nothing to compare
                break
            u = u + self.lu.solve(rest)
        y = np.zeros((self.count, right.shape[1]))
        y[self.index] = u[self.n :]
        return u[: self.n], y
