"""Diagonal plus rank one: Sherman-Morrison and Woodbury against the dense definitions, in every structure."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import twins
from torch import Tensor

import newton_plugin as npl
from newton_plugin._curvature.protocol import CurvatureStep
from newton_plugin._derivatives.sample_hessians import SampleHessians
from newton_plugin._linalg.diagonal_low_rank import DiagonalLowRank
from newton_plugin._linalg.diagonal_rank_one import DiagonalRankOne

quick = settings(deadline=None, derandomize=True, max_examples=30)


def softmax_hessians(n: int, m: int, seed: int) -> tuple[Tensor, DiagonalRankOne]:
    """Gradients, and cross-entropy's Hessians ``a (diag(p) - p p')`` with one sample ignored."""
    generator = torch.Generator().manual_seed(seed)
    y, t = torch.randn(2, n, m, generator=generator, dtype=torch.float64)
    a = torch.rand(n, generator=generator, dtype=torch.float64) + 0.5
    a[0] = 0
    p = torch.softmax(3 * y, -1)
    return a.unsqueeze(-1) * (p - torch.softmax(t, -1)), DiagonalRankOne(a.unsqueeze(-1) * p, a, p)


def indefinite_hessians(n: int, m: int, seed: int) -> tuple[Tensor, DiagonalRankOne]:
    generator = torch.Generator().manual_seed(seed)
    g, p = torch.randn(2, n, m, generator=generator, dtype=torch.float64)
    diagonal = torch.randn(n, m, generator=generator, dtype=torch.float64)
    return g, DiagonalRankOne(diagonal, torch.randn(n, generator=generator, dtype=torch.float64), p)


def dense(form: DiagonalRankOne, n: int, m: int) -> Tensor:
    own = [torch.diag(form.diagonal.expand(n, m)[i]) for i in range(n)]
    if form.weight is not None and form.vector is not None:
        own = [h - form.weight[i] * torch.outer(form.vector[i], form.vector[i]) for i, h in enumerate(own)]
    return torch.stack(own)


def low_rank(diagonal: Tensor, rows: Tensor) -> DiagonalLowRank:
    """``diag(D) - Q' Q``."""
    ones = torch.ones(len(rows), dtype=torch.float64)
    return DiagonalLowRank(diagonal, rows / 3, 3 * ones, -ones[0])


def step(g: Tensor, form: DiagonalRankOne, structure: Any, power: float, damping: float) -> CurvatureStep:
    return npl.Hessian(structure, power).step(g, SampleHessians.of_rank_one(form), npl.Tikhonov(damping))


@quick
@given(
    n=st.integers(1, 6),
    m=st.integers(1, 40),
    seed=st.integers(0, 1000),
    structure=st.sampled_from(["mean", "per_sample", "isotropic"]),
    power=st.sampled_from([1, 0.5]),
    make=st.sampled_from([softmax_hessians, indefinite_hessians]),
)
def test_every_structure_equals_the_dense_definition(
    n: int, m: int, seed: int, structure: str, power: float, make: Any
) -> None:
    g, form = make(n, m, seed)
    ours = step(g, form, structure, power, 0.1).step
    h = dense(form, n, m)
    if not bool((h == 0).all()):  # else Fisher takes its place
        assert twins.relative_error(ours, twins.step(g, h, "hessian", structure, power, 0.1)) <= 1e-10


@pytest.mark.parametrize("structure", ["mean", "per_sample"])
@pytest.mark.parametrize("power", [1, 0.5])
@pytest.mark.parametrize("make", [softmax_hessians, indefinite_hessians])
@pytest.mark.parametrize("damping", [0.1, 1e-5])
def test_wide_outputs_where_no_matrix_is_formed(structure: Any, power: float, make: Any, damping: float) -> None:
    g, form = make(5, 200, 1)
    taken = step(g, form, structure, power, damping)
    theirs = twins.step(g, dense(form, 5, 200), "hessian", structure, power, damping)
    if structure == "per_sample" or make is softmax_hessians:  # a mean with negative weights is formed
        assert taken.matrix is None
    assert twins.relative_error(taken.step, theirs) <= 1e-9
    low, high = taken.extremes()
    values = torch.linalg.eigvalsh(dense(form, 5, 200).mean(0) if structure == "mean" else dense(form, 5, 200))
    # Per sample from 48 products: extreme eigenvalues come first.
    assert abs(float(high - values.max())) <= 1e-3 * float(values.abs().max())
    assert abs(float(low - values.min())) <= 1e-3 * float(values.abs().max())


def test_automatic_damping_where_no_matrix_is_formed() -> None:
    """One batch, so the running mean is its own C; above 256 features the mean goes by Woodbury."""
    g, form = softmax_hessians(6, 300, 2)
    taken = npl.Hessian().step(g, SampleHessians.of_rank_one(form), npl.AutoDamping(0.3))
    c = dense(form, 6, 300).mean(0)
    d = 0.3 * float(torch.linalg.matrix_norm(c)) / 300**0.5
    assert abs(float(taken.damping) - d) <= 1e-10 * d
    assert twins.relative_error(taken.step, torch.linalg.solve(c + d * torch.eye(300).double(), g.T).T) <= 1e-10


def test_a_second_batch_is_rescaled_to_the_running_scale() -> None:
    curvature, damping = npl.Hessian(), npl.AutoDamping(0.3, decay=0.9, floor=0)
    scales = []
    for seed in (2, 3):
        g, form = softmax_hessians(6, 300, seed)
        form = DiagonalRankOne(seed * form.diagonal, seed * form.weight, form.vector)  # type: ignore[operator]
        taken = curvature.step(g, SampleHessians.of_rank_one(form), damping)
        c = dense(form, 6, 300).mean(0)
        scales.append(float(torch.linalg.matrix_norm(c)) / 300**0.5)
    running = (0.9 * scales[0] + scales[1]) / 1.9
    c = c * running / scales[1] + 0.3 * running * torch.eye(300).double()
    assert twins.relative_error(taken.step, torch.linalg.solve(c, g.T).T) <= 1e-10


def test_a_pure_diagonal() -> None:
    """mse and bce: a diagonal mean; its repair is that of the dense matrix."""
    for shift in (0.0, -0.3):
        g = torch.randn(4, 150, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        form = DiagonalRankOne(torch.rand(4, 150, generator=torch.Generator().manual_seed(1)).double() + shift)
        for structure in ("mean", "per_sample"):
            theirs = twins.step(g, dense(form, 4, 150), "hessian", structure, 1, 0.1)
            taken = step(g, form, structure, 1, 0.1)
            assert twins.relative_error(taken.step, theirs) <= 1e-12
            if structure == "per_sample":
                assert [float(v) for v in taken.extremes()] == [float(form.diagonal.min()), float(form.diagonal.max())]


def test_a_mean_that_the_batch_weights_make_indefinite() -> None:
    """A class with a negative weight: no square root for Woodbury, and the repair of the dense twin all the same."""
    g, form = softmax_hessians(5, 200, 4)
    assert form.weight is not None
    signs = torch.tensor([1.0, -1, 1, -1, 1], dtype=torch.float64)
    form = DiagonalRankOne(signs.unsqueeze(-1) * form.diagonal, signs * form.weight, form.vector)
    theirs = twins.step(g, dense(form, 5, 200), "hessian", "mean", 1, 0.01)
    assert twins.relative_error(step(g, form, "mean", 1, 0.01).step, theirs) <= 1e-10


def test_scales_do_not_need_a_matrix() -> None:
    g, form = indefinite_hessians(3, 17, 0)
    h = dense(form, 3, 17)
    assert twins.relative_error(form.squared_norms(), h.square().sum((1, 2))) <= 1e-12
    c = low_rank(form.diagonal[0], g)
    theirs = torch.linalg.matrix_norm(torch.diag(form.diagonal[0]) - g.T @ g) / 17**0.5
    assert abs(float(c.scale() - theirs)) <= 1e-12 * float(theirs)


def test_repairs_too_large_for_a_matrix() -> None:
    """Descent and the bound |step| <= |g| / d, whatever the weights; two-thousand features, no m x m."""
    g, form = indefinite_hessians(4, 2000, 5)
    d = torch.tensor(0.1, dtype=torch.float64)
    mean = low_rank(form.diagonal[0], g)
    for solved in (form.inverse_times(g, d, 1), mean.inverse(d, 1)(g)):
        assert bool(((solved * g).sum(-1) > 0).all())
        assert bool((solved.norm(dim=-1) <= 10.001 * g.norm(dim=-1)).all())


@pytest.mark.parametrize("structure", ["mean", "per_sample", "isotropic", "diagonal"])
@pytest.mark.parametrize("m", [10, 200])
def test_a_zero_hessian_is_replaced_by_fisher(structure: Any, m: int) -> None:
    g, form = softmax_hessians(5, m, 0)
    zero = DiagonalRankOne(torch.zeros_like(form.diagonal), torch.zeros(5).double(), form.vector)
    for zeros in (zero, DiagonalRankOne(zero.diagonal)):
        for damping in (npl.Tikhonov(0.1), npl.AutoDamping(0.3, decay=0, own=0)):
            taken = npl.Hessian(structure).step(g, SampleHessians.of_rank_one(zeros), damping)
            fisher = npl.EmpiricalFisher(structure).step(g, None, damping)
            assert bool(taken.zero_hessian)
            if m == 200 and structure == "mean" and zeros.weight is None:
                fisher = npl.EmpiricalFisher("diagonal").step(g, None, damping)  # the form stays a diagonal
            if structure == "per_sample" and isinstance(damping, npl.AutoDamping):
                continue  # relative to |g|^2 / sqrt(m) here, to |g|^2 / m there
            assert twins.relative_error(taken.step, fisher.step) <= 1e-10


@pytest.mark.parametrize("structure", ["mean", "per_sample", "isotropic", "diagonal"])
@pytest.mark.parametrize("m", [10, 200])
def test_a_nan_is_reported_and_raises_nothing(structure: Any, m: int) -> None:
    g, form = softmax_hessians(5, m, 0)
    assert form.vector is not None
    form.vector[2, 3] = torch.nan
    form.diagonal[2, 3] = torch.nan
    taken = npl.Hessian(structure).step(g, SampleHessians.of_rank_one(form), npl.Tikhonov(0.1))
    assert not bool(taken.finiteness.curvature)


def test_negative_class_weights_under_vmap() -> None:
    """Nobody can see which samples have to be repaired: ``|H|`` of a negative semi-definite H is -H."""
    torch.manual_seed(0)
    weight = torch.linspace(-1.0, 2.0, 20, dtype=torch.float64)
    y, t = torch.randn(3, 12, 20, dtype=torch.float64), torch.randint(0, 20, (12,))

    def loss(y: Tensor, t: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(y, t, weight=weight, reduction="sum") / len(y)

    for options in ({}, {"damping": 0.01}, {"damping": 5.0}):
        rule: dict[str, Any] = {"curvature": "hessian", "structure": "per_sample", **options}
        found = torch.func.vmap(lambda y: npl.newton_step(loss, y, t, **rule).step)(y)  # noqa: B023
        expected = torch.stack([npl.newton_step(loss, member, t, **rule).step for member in y])
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
