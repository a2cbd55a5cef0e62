"""refresh_every=k: C of the last refresh, gradients of now, no second differentiation in between."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from tests import twins
from torch import Tensor, nn

import newton_plugin as npl

G = torch.Generator().manual_seed(0)
BATCHES = torch.randn(7, 6, 4, generator=G, dtype=torch.float64)
MADE = [npl.EmpiricalFisher, npl.Hessian]
STRUCTURES = ["mean", "isotropic", "diagonal", "block"]


def loss(y: Tensor) -> Tensor:
    return (y.cosh() + y.sin() * y.roll(1, -1)).sum(-1).mean()


def hvp_of(y: Tensor) -> Any:
    _, h = twins.gradients_and_hessians(loss, y)
    return lambda v: torch.einsum("nij,knj->kni", h, v)


def gradient_of(y: Tensor) -> Tensor:
    return twins.gradients_and_hessians(loss, y)[0]


def matrix_of(matrix: Tensor, row: int) -> Tensor:
    """The C of one row, from any structure's; two positions for blocks."""
    if matrix.ndim == 3:
        return matrix[row % 2]
    return torch.diag(matrix.expand(4)) if matrix.ndim < 2 else matrix


@pytest.mark.parametrize("make", MADE)
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("damping", [npl.Tikhonov(0.1), npl.AutoDamping(own=0)], ids=["fixed", "auto"])
def test_steps_between_refreshes_use_the_last_curvature(make: Any, structure: str, damping: Any) -> None:
    kept, damping = make(structure, refresh_every=3), copy.deepcopy(damping)
    fresh, own = make(structure), copy.deepcopy(damping)
    for i, y in enumerate(BATCHES):
        wanted = i % 3 == 0
        if make is not npl.EmpiricalFisher:
            assert kept.wants_hessian() == wanted
            assert fresh.wants_hessian()
        g = gradient_of(y)
        taken = kept.step(g, hvp_of(y) if wanted else None, damping, groups=2)
        if wanted:
            theirs = fresh.step(g, hvp_of(y), own, groups=2)
            assert torch.equal(taken.step, theirs.step)
        # (C + d I)^-1 is linear in g: what it makes of the basis makes the step of any gradient.
        assert torch.equal(taken.damping, theirs.damping)
        assert taken.matrix is not None
        assert torch.equal(taken.matrix, theirs.matrix)
        assert taken.fallback == ""
        assert taken.finiteness.agreed == (wanted and make is npl.EmpiricalFisher)
        for j, row in enumerate(g):
            c = matrix_of(taken.matrix, j)
            exact = twins.power_solve(c, float(taken.damping), row, 1)
            assert twins.relative_error(taken.step[j], exact) <= 1e-10


@pytest.mark.parametrize("power", [1, 0.5])
def test_wide_fisher_is_kept_exactly(power: float) -> None:
    """N < m: the kept C is that of the rows of the refresh, by its own eigenvectors."""
    first, second = torch.randn(2, 5, 300, generator=G, dtype=torch.float64)
    for damping in (npl.Tikhonov(0.1), npl.AutoDamping(0.3, own=0)):
        kept = npl.EmpiricalFisher(power=power, refresh_every=2)
        fresh = npl.EmpiricalFisher(power=power).step(first, None, copy.deepcopy(damping))
        taken = kept.step(first, None, damping)
        assert twins.relative_error(taken.step, fresh.step) <= 1e-9
        taken = kept.step(second, None, damping)
        theirs = torch.stack([twins.power_solve(first.T @ first / 5, float(taken.damping), g, power) for g in second])
        assert twins.relative_error(taken.step, theirs) <= 1e-9


@pytest.mark.parametrize("make", MADE)
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("how", ["state", "pickle", "deepcopy"])
def test_a_checkpoint_in_between_goes_on_to_the_bit(make: Any, structure: str, how: str, tmp_path: Any) -> None:
    damping = npl.AutoDamping()
    ours = make(structure, refresh_every=3)
    for y in BATCHES[:4]:
        ours.step(gradient_of(y), hvp_of(y), damping, groups=2)
    if how == "state":
        torch.save([ours.state_dict(), damping.state_dict()], tmp_path / "state")
        curvature, rule = torch.load(tmp_path / "state", weights_only=True)
        theirs, their_damping = make(structure, refresh_every=3), npl.AutoDamping()
        theirs.load_state_dict(curvature)
        their_damping.load_state_dict(rule)
    elif how == "pickle":
        theirs, their_damping = pickle.loads(pickle.dumps((ours, damping)))
    else:
        theirs, their_damping = copy.deepcopy((ours, damping))
    for y in BATCHES[4:]:
        g, hvp = gradient_of(y), hvp_of(y)
        a, b = ours.step(g, hvp, damping, groups=2), theirs.step(g, hvp, their_damping, groups=2)
        assert torch.equal(a.step, b.step)


def test_nothing_is_stored_that_is_not_used_again() -> None:
    for make in MADE:
        curvature = make()
        curvature.step(gradient_of(BATCHES[0]), hvp_of(BATCHES[0]), npl.Tikhonov(0.1))
        assert "kept" not in curvature.state_dict()
        assert pickle.loads(pickle.dumps(curvature))._kept.matrix is None
    wide = npl.EmpiricalFisher(refresh_every=2)
    wide.step(BATCHES[0], None, npl.Tikhonov(0.1))
    assert "kept" in wide.state_dict()
    old = {"total": torch.eye(4), "weight": torch.tensor(1.0)}  # a checkpoint from before there was refresh_every
    npl.EmpiricalFisher().load_state_dict(old)


class Counted(torch.autograd.Function):
    """Cosh, that counts how often it is differentiated twice."""

    twice = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.cosh()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return Slope.apply(x) * grad


class Slope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sinh()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        Counted.twice += 1
        return ctx.saved_tensors[0].cosh() * grad


def test_the_loss_is_not_differentiated_twice_in_between() -> None:
    torch.manual_seed(0)
    head, hook = nn.Linear(4, 4).double(), npl.LossHook(curvature=npl.Hessian(refresh_every=4), damping=0.1)
    counts = []
    for y in BATCHES[:6]:
        Counted.twice = 0
        hook(Counted.apply(head(y)).sum(-1).mean()).backward()
        counts.append(Counted.twice > 0)
    assert counts == [True, False, False, False, True, False]
    assert hook.diagnostics()["fallbacks"] == 0


def test_a_curvature_that_is_not_finite_leaves_its_gradients_alone_until_the_next_refresh() -> None:
    curvature = npl.Hessian(refresh_every=2)
    bad = lambda v: v * torch.nan  # noqa: E731
    assert not bool(curvature.step(gradient_of(BATCHES[0]), bad, npl.Tikhonov(0.1)).finiteness.curvature)
    assert not bool(curvature.step(gradient_of(BATCHES[1]), None, npl.Tikhonov(0.1)).finiteness.curvature)
    assert bool(curvature.step(gradient_of(BATCHES[2]), hvp_of(BATCHES[2]), npl.Tikhonov(0.1)).finiteness.curvature)


def test_outputs_of_another_shape_are_not_solved_with_the_kept_curvature() -> None:
    fisher = npl.EmpiricalFisher("block", refresh_every=9)
    fisher.step(BATCHES[0], None, npl.Tikhonov(0.1), groups=2)
    again = fisher.step(BATCHES[1], None, npl.Tikhonov(0.1), groups=3)
    fresh = npl.EmpiricalFisher("block").step(BATCHES[1], None, npl.Tikhonov(0.1), groups=3)
    assert torch.equal(again.step, fresh.step)
    hessian = npl.Hessian("block", refresh_every=9)
    hessian.step(gradient_of(BATCHES[0]), hvp_of(BATCHES[0]), npl.Tikhonov(0.1), groups=2)
    other = hessian.step(gradient_of(BATCHES[1]), None, npl.Tikhonov(0.1), groups=3)
    assert other.fallback == "the C that is kept is of outputs of another shape"


@pytest.mark.parametrize("make", [npl.EmpiricalFisher, npl.Hessian])
@pytest.mark.parametrize(
    ("structure", "every", "kind", "match"),
    [
        ("mean", 0, ValueError, r"refresh_every must be a positive integer; got 0. 1 keeps nothing"),
        ("mean", 2.0, TypeError, r"refresh_every must be a positive integer; got 2.0 of type float"),
        ("mean", True, TypeError, r"refresh_every must be a positive integer; got True"),
        (
            "per_sample",
            2,
            ValueError,
            r"refresh_every must be 1 with structure='per_sample'; got 2. .*'mean'",
        ),
    ],
)
def test_wrong_arguments(make: Any, structure: str, every: Any, kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match):
        make(structure, refresh_every=every)


def test_it_is_seen_in_the_repr() -> None:
    assert repr(npl.Hessian(refresh_every=4)) == "Hessian(structure='mean', power=1, refresh_every=4)"
    assert repr(npl.EmpiricalFisher()) == "EmpiricalFisher(structure='mean', power=1)"
