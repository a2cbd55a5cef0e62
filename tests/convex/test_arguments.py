"""What solve_qp takes: sparse layouts, ways to say "no constraints", and what the caller's own solver is shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from newton_plugin import ArgumentTypeError, ShapeError
from newton_plugin.convex import Problem, solve_qp

N = 4


def dense_data() -> list[Tensor]:
    """Six tensors, rows in force among them."""
    eye = torch.eye(N, dtype=torch.float64)
    p, one = torch.tensor([1.0, -2.0, 0.1, 3.0], dtype=torch.float64), torch.ones(1, N, dtype=torch.float64)
    return [2 * eye, p, one, 0.2 * one[0, :1], torch.cat((eye, -eye)), torch.full((2 * N,), 0.3, dtype=torch.float64)]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "COO": Tensor.to_sparse_coo,
    "CSR": Tensor.to_sparse_csr,
    "CSC": Tensor.to_sparse_csc,
    "BSR": lambda t: t.to_sparse_bsr((1, 2)),
    "BSC": lambda t: t.to_sparse_bsc((1, 2)),
}


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")  # torch: the state of its support
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_sparse_layout(layout: str) -> None:
    pytest.importorskip("scipy")
    dense = [t.requires_grad_() for t in dense_data()]
    sparse = [
        (LAYOUTS[layout](t.detach()) if t.ndim == 2 else t.detach().clone()).requires_grad_() for t in dense_data()
    ]
    ours, theirs = solve_qp(*sparse), solve_qp(*dense)
    assert torch.allclose(ours.x, theirs.x, rtol=1e-12, atol=1e-13)
    assert torch.allclose(ours.lam, theirs.lam, rtol=1e-12, atol=1e-13)
    gradients = torch.autograd.grad(ours.x.square().sum(), sparse)
    for mine, right, t in zip(gradients, torch.autograd.grad(theirs.x.square().sum(), dense), sparse, strict=True):
        stored = t.detach().to_dense() != 0  # the gradient exists at the stored entries
        assert torch.allclose(mine.to_dense() * stored, right * stored, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("at", [1, 3, 5])
def test_sparse_vectors_are_refused(at: int) -> None:
    data = dense_data()
    data[at] = data[at].to_sparse_coo()
    name = "QpAbGh"[at]
    with pytest.raises(ArgumentTypeError, match=rf"{name} must be dense; got layout .*{name}.to_dense\(\)"):
        solve_qp(*data)


@pytest.mark.parametrize("at", [2, 4])
def test_an_empty_tensor_for_no_constraints_is_answered(at: int) -> None:
    """qpth's habit: torch.Tensor() has shape (0,)."""
    data: list[Tensor | None] = list(dense_data())
    data[at] = data[at + 1] = torch.Tensor()
    names = f"{'QpAbGh'[at]} and {'QpAbGh'[at + 1]}"
    with pytest.raises(ShapeError, match=rf"got an empty tensor of shape \(0,\)\. .*pass None for {names}"):
        solve_qp(*data)
    data[at] = data[at + 1] = None
    none = solve_qp(*data).x
    data[at], data[at + 1] = torch.zeros(0, N, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    assert torch.equal(solve_qp(*data).x, none)


@pytest.mark.parametrize("n", [1, 3, 4])
@pytest.mark.parametrize("rows", [(0, 0), (0, 1), (1, 3), (2, 7)])
@pytest.mark.parametrize("batch", [None, 2])
def test_an_own_solver_sees_the_callers_problem(n: int, rows: tuple[int, int], batch: int | None) -> None:
    """Not the added variable and rows of the standard form, and infinity as infinity."""
    m, k = min(rows[0], n), rows[1]
    g = torch.Generator().manual_seed(0)
    Q, lead = torch.eye(n, dtype=torch.float64), () if batch is None else (batch,)
    p, A, G = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((*lead, n), (m, n), (k, n)))
    b, h = torch.zeros(m, dtype=torch.float64), torch.rand(k, generator=g, dtype=torch.float64)
    h[:1] = torch.inf
    seen: list[tuple[Tensor, ...]] = []

    def own(*data: Tensor) -> Any:
        seen.append(data)
        solution = solve_qp(*data)
        return solution.x, solution.nu, solution.lam

    solution = solve_qp(Q, p, A, b, G, h, solver=own)
    for name, mine, given in zip("QpAbGh", seen[0], (Q, p, A, b, G, h), strict=True):
        if name in "pbh":
            given = given.expand(batch or 1, given.shape[-1])
        assert torch.equal(mine, given), name
    assert torch.allclose(solution.x, solve_qp(Q, p, A, b, G, h).x, rtol=1e-12, atol=1e-13)


class Rows:
    """A QPSolver that claims the same rows for every problem."""

    name = "rows"

    def __init__(self, claim: Tensor | None) -> None:
        self.claim, self.seen = claim, []

    def active_rows(self, problem: Problem) -> Tensor | None:
        self.seen.append(problem)
        return self.claim


def test_a_solver_object_sees_the_callers_rows() -> None:
    eye = torch.eye(3, dtype=torch.float64)
    p, h = torch.full((2, 3), -1.0, dtype=torch.float64), torch.full((3,), 0.5, dtype=torch.float64)
    solver = Rows(torch.ones(2, 3, dtype=torch.bool))
    assert torch.allclose(solve_qp(eye, p, G=eye, h=h, solver=solver).x, torch.full((2, 3), 0.5, dtype=torch.float64))
    assert [tuple(t.shape) for t in solver.seen[0][:4]] == [(3, 3), (2, 3), (3, 3), (2, 3)]
    assert torch.allclose(solve_qp(eye, p, G=eye, h=h, solver=Rows(None)).x, h)
    with pytest.raises(
        ShapeError, match=r"shape \(2, 3\), an entry for each problem and row; rows returned .*\(2, 8\)"
    ):
        solve_qp(eye, p, G=eye, h=h, solver=Rows(torch.ones(2, 8, dtype=torch.bool)))
