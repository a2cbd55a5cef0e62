"""Sparse problems: the dense answer, gradients at the stored entries, and the failures."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from tests.convex.problems import known_qp
from torch import Tensor

from newton_plugin import ArgumentError, ArgumentTypeError, NoGradientError, ShapeError
from newton_plugin.convex import ProblemFailedError, solve_qp
from newton_plugin.convex._sparse import system

pytest.importorskip("scipy.sparse")


@pytest.fixture(autouse=True)
def _torch_says_that_sparse_is_beta() -> object:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse (CSR|invariant)", category=UserWarning)
        yield


def sparse(t: Tensor | None, layout: str) -> Tensor:
    assert t is not None
    return t.to_sparse_coo() if layout == "coo" else t.to_sparse_csr()


@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_equals_dense(layout: str) -> None:
    known = known_qp(12, 2, 15, active=0.4, condition=100.0, seed=3)
    leaves = known.leaves()
    Q, p, A, b, G, h = known.data
    ours = solve_qp(sparse(Q, layout), p, sparse(A, layout), b, sparse(G, layout), h)  # type: ignore[arg-type]
    theirs = solve_qp(*known.data)
    assert (ours.x - known.x).abs().max() < 1e-11
    assert torch.equal(ours.active, known.active)
    for a, c in zip(
        torch.autograd.grad(ours.x.square().sum() + ours.lam.sum() + ours.nu.sum(), leaves),
        torch.autograd.grad(theirs.x.square().sum() + theirs.lam.sum() + theirs.nu.sum(), leaves),
        strict=True,
    ):
        assert (a - c).norm() < 1e-9 * c.norm().clamp(min=1e-3)


@pytest.mark.parametrize("solver", ["auto", "clarabel", "osqp", "piqp"])
def test_a_chain_of_2000(solver: str) -> None:
    """Total-variation-like: tridiagonal Q, differences bounded; the optimality conditions hold to 1e-10."""
    if solver != "auto":
        pytest.importorskip(solver)
    n = 2000
    i = torch.arange(n)
    index = torch.stack([torch.cat([i, i[1:], i[:-1]]), torch.cat([i, i[:-1], i[1:]])])
    values = torch.cat([torch.full((n,), 2.5), torch.full((2 * n - 2,), -1.0)]).double()
    Q = torch.sparse_coo_tensor(index, values, (n, n), check_invariants=True).coalesce()
    rows = torch.stack([torch.cat([i[:-1], i[:-1]]), torch.cat([i[:-1], i[1:]])])
    steps = torch.cat([torch.full((n - 1,), -1.0), torch.full((n - 1,), 1.0)]).double()
    G = torch.sparse_coo_tensor(rows, steps, (n - 1, n), check_invariants=True).coalesce()
    p = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    h = torch.full((n - 1,), 0.1, dtype=torch.float64)
    solution = solve_qp(Q, p, G=G, h=h, solver=solver)
    x, lam = solution.x.detach(), solution.lam.detach()
    assert 100 < int(solution.active.sum()) < n - 1
    assert (Q @ x + p.detach() + G.mT @ lam).abs().max() < 1e-10
    assert (G @ x - h).max() < 1e-10
    assert lam.min() > -1e-10
    g = torch.ones(n, dtype=torch.float64)
    (dp,) = torch.autograd.grad(solution.x, p, g)
    moved = solve_qp(Q, p.detach() + 1e-7 * g, G=G, h=h, solver=solver).x
    assert abs(float(dp @ g) - float((moved - x).sum()) / 1e-7) < 1e-4 * abs(float(dp @ g))


def test_double_backward_in_vectors_and_an_error_in_matrices() -> None:
    known = known_qp(6, 1, 8, active=0.4, seed=3)
    Q, p, A, b, G, h = (t for t in known.data if t is not None)
    fixed = [Q.to_sparse(), A.to_sparse(), G.to_sparse()]

    def ours(p: Tensor, b: Tensor, h: Tensor) -> Tensor:
        return (solve_qp(fixed[0], p, fixed[1], b, fixed[2], h).x ** 3).sum()

    vectors = (p.requires_grad_(), b.requires_grad_(), h.requires_grad_())
    assert torch.autograd.gradgradcheck(ours, vectors)
    values = Q.to_sparse().values().requires_grad_()
    leaf = torch.sparse_coo_tensor(Q.to_sparse().indices(), values, (6, 6), check_invariants=True)
    loss = solve_qp(leaf, p, A, b, G, h).x.square().sum()
    with pytest.raises(NoGradientError, match="Detach the matrix"):
        torch.autograd.grad(loss, values, create_graph=True)


def test_batched_vectors() -> None:
    Q, _, A, b, G, h = (t for t in known_qp(6, 1, 8, active=0.4, seed=3).data if t is not None)
    p = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    solution = solve_qp(Q.to_sparse(), p, A.to_sparse(), b, G.to_sparse(), h)
    assert solution.status.shape == (2, 3)
    assert torch.allclose(solution.x, solve_qp(Q, p, A, b, G, h).x, rtol=1e-9, atol=1e-11)


def test_failures() -> None:
    pytest.importorskip("clarabel")  # without any sparse solver infeasible problems are only "not converged"
    Q, p, A, b, G, _ = (t for t in known_qp(6, 1, 8, active=0.4, seed=3).data if t is not None)
    zero = torch.sparse_coo_tensor(torch.zeros(2, 0, dtype=torch.long), torch.zeros(0), (6, 6), check_invariants=True)
    pair = torch.stack([G[0], -G[0]])
    minus = -torch.ones(2, dtype=torch.float64)
    cases = {
        "non convex": lambda: solve_qp(-Q.to_sparse(), p, A, b),
        "infeasible": lambda: solve_qp(Q.to_sparse(), p, A, b, pair, minus),
        "unbounded": lambda: solve_qp(zero.double(), p, A, b),
        "not finite": lambda: solve_qp(Q.to_sparse(), p * torch.nan, A, b),
    }
    for word, call in cases.items():
        with pytest.raises(ProblemFailedError, match=word):
            call()


def test_messages() -> None:
    Q, p, A, b, *_ = (t for t in known_qp(6, 1, 8, active=0.4, seed=3).data if t is not None)
    with pytest.raises(ShapeError, match=r"A must have shape \(1, 6\)"):
        solve_qp(Q.to_sparse(), p, A[:, :3], b)
    with pytest.raises(ArgumentError, match="solver for a sparse problem must be"):
        solve_qp(Q.to_sparse(), p, solver="daqp")
    with pytest.raises(ArgumentTypeError, match=r"Q.to_dense\(\)"):
        solve_qp(Q.to_sparse(), p, solver=lambda *data: None)
    with pytest.raises(ArgumentError, match="no dense Jacobian"):
        solve_qp(Q.to_sparse(), p).jacobian("p")


@pytest.mark.parametrize("name", "QpAbGh")
def test_every_argument_has_to_be_on_the_cpu(name: str) -> None:
    data = dict(zip("QpAbGh", known_qp(6, 1, 8, active=0.4, seed=3).data, strict=True))
    data.update({matrix: sparse(data[matrix], "coo") for matrix in "QAG"})
    elsewhere: Any = {**data, name: data[name].to("meta")}  # type: ignore[union-attr]
    with pytest.raises(ArgumentError, match=rf"solved on the CPU; got {name} on meta\. Move the data with \.cpu"):
        solve_qp(**elsewhere)


def test_without_any_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Block exchanges from no active rows at all, with scipy alone."""
    monkeypatch.setattr(system, "_AUTOMATIC", ())
    for seed in range(3):
        known = known_qp(12, 2, 15, active=0.3, condition=10.0, seed=seed)
        Q, p, A, b, G, h = (t for t in known.data if t is not None)
        solution = solve_qp(Q.to_sparse(), p, A.to_sparse(), b, G.to_sparse(), h)
        assert solution.solver == "pivoting"
        assert (solution.x - known.x).abs().max() < 1e-10


def test_redundant_rows_leave_x_exact() -> None:
    known = known_qp(10, 2, 12, active=0.3, condition=10.0, seed=5)
    Q, p, A, b, G, h = (t for t in known.data if t is not None)
    p = p.requires_grad_()
    A2, b2, G2, h2 = (torch.cat([t, t[:2]]) for t in (A, b, G, h))
    solution = solve_qp(Q.to_sparse(), p, A2.to_sparse(), b2, G2.to_sparse(), h2)
    assert (solution.x - known.x).abs().max() < 1e-9
    ours, theirs = (torch.autograd.grad(x.sum(), p)[0] for x in (solution.x, solve_qp(Q, p, A, b, G, h).x))
    assert (ours - theirs).abs().max() < 1e-8


def test_second_derivatives_of_a_loss_are_the_closed_form() -> None:
    Q, p, A, b, G, h = (t for t in known_qp(10, 2, 8, active=0.3, seed=6).data if t is not None)
    p = p.requires_grad_()
    x = solve_qp(Q.to_sparse(), p, A.to_sparse(), b, G.to_sparse(), h).x
    (g,) = torch.autograd.grad(x.square().sum(), p, create_graph=True)
    H = torch.stack([torch.autograd.grad(entry, p, retain_graph=True)[0] for entry in g])
    closed = solve_qp(Q, p.detach(), A, b, G, h).hessian(2 * torch.eye(10, dtype=torch.float64))
    assert (H - closed).abs().max() < 1e-9
