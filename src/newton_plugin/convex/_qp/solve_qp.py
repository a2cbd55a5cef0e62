"""solve_qp: a quadratic program as a differentiable function of its data; BPQPLayer, the same as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from newton_plugin._runtime.compiler import eager
from newton_plugin.convex._qp.arguments import check_data, check_options, check_pairs
from newton_plugin.convex._qp.find_active_set import FindActiveSet, Request
from newton_plugin.convex._solution import QPSolution
from newton_plugin.convex._solvers.choose import prefers_compiled
from newton_plugin.convex._solvers.protocol import Solver
from newton_plugin.convex._sparse.solve import is_sparse, solve_sparse
from newton_plugin.convex._system.factors import Factors
from newton_plugin.convex._system.kkt import KKTSolve
from newton_plugin.convex._system.standard_form import batch_shape, flat_matrix, flat_vector, standard_form
from newton_plugin.convex._system.transforms import under_transform

__all__ = ["BPQPLayer", "solve_qp"]


@eager
def solve_qp(
    Q: Tensor,
    p: Tensor,
    A: Tensor | None = None,
    b: Tensor | None = None,
    G: Tensor | None = None,
    h: Tensor | None = None,
    *,
    solver: Solver = "auto",
    reg: float = 0.0,
    refine: bool | str = "auto",
    on_failure: str = "raise",
) -> QPSolution:
    r"""Minimise ``1/2 x'Qx + p'x`` subject to ``A x = b`` and ``G x <= h``, differentiably.

    Args:
        Q: (..., n, n), positive semi-definite; only its symmetric part counts. Q, A and G may also be sparse
            tensors (COO, CSR, CSC, BSR or BSC, no batch dimensions): see ``_sparse/solve.py``.
        p: (..., n).
        A, b: (..., m, n) and (..., m), or None: no equalities.
        G, h: (..., k, n) and (..., k), or None: no inequalities; entries of h may be ``inf``.
        solver: ``"auto"``, ``"numba"``, ``"torch"``, ``"daqp"``, ``"piqp"``, ``"clarabel"``, ``"osqp"``, a
            :class:`QPSolver`, or a callable ``(Q, p, A, b, G, h) -> (x, nu, lam)``.
        reg: adds ``reg/2 |x|^2``; makes the solution of a linear program unique and differentiable.
        refine: a step of iterative refinement: ``"auto"`` where Q is ill-conditioned, True, or False.
        on_failure: what happens where there is no solution: ``"raise"``, ``"warn"`` or ``"nan"``; the last two
            give x = NaN there. The other problems of the batch are solved as if alone.

    A solved problem of a batch does not depend on its neighbours. On the compiled path (``"numba"``, which ``"auto"``
    takes on the CPU if numba is installed; its first call compiles for some twenty seconds) it is bit-equal to being
    solved alone. On the other paths this holds with up to 24 rows of constraints; beyond, it is equal to rounding (on
    the CPU; ``_system/products.py`` says why).

    Any argument may have leading batch dimensions, which broadcast. A matrix without them is shared by the batch,
    which is much the fastest. float32 in gives float32 out; the computation is in float64.

    Returns:
        :class:`QPSolution`: x, nu, lam, status, active. x, nu and lam are differentiable in all six arguments, to
        any order, also by ``torch.func``.

    Raises:
        ProblemFailedError: a problem without solution, with ``on_failure="raise"``.
        ArgumentError, ArgumentTypeError, ShapeError: an argument that does not fit.
        MissingSolverError: the solver named is not installed.

    Source: Pan et al., "BPQP: A differentiable convex optimization framework for efficient end-to-end learning",
    NeurIPS 2024 (its printed backward formulas have errors; see ``_system/kkt.py`` for the ones used here).

    The point of the half-space ``x_1 + x_2 <= 1`` nearest to (1, 1), and how it moves with h:

    >>> h = torch.tensor([1.0], requires_grad=True)
    >>> solution = solve_qp(torch.eye(2), -torch.ones(2), G=torch.ones(1, 2), h=h)
    >>> solution.x.tolist(), solution.lam.tolist()
    ([0.5, 0.5], [0.5])
    >>> torch.autograd.grad(solution.x[0], h)[0].tolist()
    [0.5]
    """
    check_options(reg, refine, on_failure)
    if is_sparse(Q) or is_sparse(A) or is_sparse(G):
        check_pairs(p, A, b, G, h)
        return solve_sparse(Q, p, A, b, G, h, solver=solver, reg=reg, on_failure=on_failure)
    Q, p, A, b, G, h, dtype, precision = check_data(Q, p, A, b, G, h)
    n, m, k = p.shape[-1], b.shape[-1], h.shape[-1]
    shape = batch_shape(Q, p, A, b, G, h)
    if reg:
        Q = Q + reg * torch.eye(n, dtype=Q.dtype, device=Q.device)
    options = Request(n, m + k, m, solver, refine, on_failure, tuple(shape), precision)
    if prefers_compiled(solver, p) and shape.numel() and not under_transform():
        solution = _solve_compiled((Q, p, A, b, G, h), options, shape, dtype)
        if solution is not None:
            return solution
    Q, p, C, c = standard_form(Q, p, A, b, G, h, shape)
    x, y, status, active, *factors = FindActiveSet.apply(Q, p, C, c, options)
    rx, ry = -p.unsqueeze(-1), c.unsqueeze(-1)
    x, y = KKTSolve.apply(Q, C, rx, ry, x.unsqueeze(-1), y.unsqueeze(-1), *factors)
    name = options.chosen[0] if options.chosen else ""
    system = (Q, C, Factors(*factors), x, y, (n, m, k), tuple(shape), dtype)
    found = (x.squeeze(-1), y.squeeze(-1), status, active)
    return _solution(found, (n, m, k), shape, dtype, on_failure, name, system)


def _solve_compiled(
    data: tuple[Tensor, ...], options: Request, shape: torch.Size, dtype: torch.dtype
) -> QPSolution | None:
    """The solution by compiled code; None where no problem is certified and the general path must solve all."""
    from newton_plugin.convex._compiled.qp import CompiledQP, find, stacked

    flat = tuple(
        t if t.ndim == own or (t.ndim == own + 1 and t.shape[0] == shape[0]) else flatten(t, shape)
        for t, own, flatten in zip(data, (2, 1) * 3, (flat_matrix, flat_vector) * 3, strict=True)
    )
    found = find(flat, shape.numel(), options.refine, options.on_failure, options.shape, options.precision)
    if found is None:
        return None
    x, y = CompiledQP.apply(*flat, found)
    Q, p, A, _, G, h = flat
    sizes = (p.shape[-1], options.m, h.shape[-1])

    def system() -> Any:
        return Q, stacked(A, G), found.factors(Q.ndim == 2), x.unsqueeze(-1), y.unsqueeze(-1), sizes, shape, dtype

    return _solution((x, y, found.status, found.active), sizes, shape, dtype, options.on_failure, "numba", system)


def _solution(
    found: tuple[Tensor, Tensor, Tensor, Tensor],
    sizes: tuple[int, int, int],
    shape: torch.Size,
    dtype: torch.dtype,
    on_failure: str,
    name: str,
    system: Any,
) -> QPSolution:
    """The result in the caller's shapes; ``found``: x (B, >= n), y (B, >= m + k), status (B,), active (B, >= m + k)."""
    x, y, status, active = found
    n, m, k = sizes
    if on_failure != "raise":
        failed = (status != 0).unsqueeze(-1)
        x, y = x.masked_fill(failed, torch.nan), y.masked_fill(failed, torch.nan)

    def finish(t: Tensor, start: int, width: int) -> Tensor:
        # Skip operations that change nothing: each costs time, and again in the backward pass.
        t = t if t.shape[-1] == width else t[:, start : start + width]
        t = t if len(shape) == 1 else t.reshape(*shape, width)
        return t if t.dtype in (dtype, torch.bool) else t.to(dtype)

    status = status if len(shape) == 1 else status.reshape(shape)
    parts = (finish(x, 0, n), finish(y, 0, m), finish(y, m, k), status, finish(active, m, k))
    return QPSolution(*parts, solver=name, system=system)


class BPQPLayer(torch.nn.Module):
    """:func:`solve_qp` as a module: ``layer(Q, p, A, b, G, h)`` gives x.

    It holds only the options; all data are arguments of the call, as in qpth's QPFunction. For the multipliers and the
    status call ``layer.solve(...)``.

    >>> layer = BPQPLayer(solver="torch")
    >>> layer(torch.eye(2), torch.tensor([-1.0, -2.0]), G=torch.eye(2), h=torch.ones(2)).tolist()
    [1.0, 1.0]
    """

    def __init__(
        self, *, solver: Solver = "auto", reg: float = 0.0, refine: bool | str = "auto", on_failure: str = "raise"
    ) -> None:
        super().__init__()
        check_options(reg, refine, on_failure)
        self.solver, self.reg, self.refine, self.on_failure = solver, reg, refine, on_failure

    def extra_repr(self) -> str:
        return f"solver={self.solver!r}, reg={self.reg}, refine={self.refine!r}, on_failure={self.on_failure!r}"

    def solve(
        self,
        Q: Tensor,
        p: Tensor,
        A: Tensor | None = None,
        b: Tensor | None = None,
        G: Tensor | None = None,
        h: Tensor | None = None,
    ) -> QPSolution:
        """The whole :class:`QPSolution`."""
        return solve_qp(
            Q, p, A, b, G, h, solver=self.solver, reg=self.reg, refine=self.refine, on_failure=self.on_failure
        )

    def forward(
        self,
        Q: Tensor,
        p: Tensor,
        A: Tensor | None = None,
        b: Tensor | None = None,
        G: Tensor | None = None,
        h: Tensor | None = None,
    ) -> Tensor:
        """x: (..., n)."""
        return self.solve(Q, p, A, b, G, h).x
