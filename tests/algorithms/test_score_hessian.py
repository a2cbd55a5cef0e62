"""Smoothed losses and Fenchel-Young losses bring their Hessian: that of double backward, from the same samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.algorithms.test_fenchel_young import _explicit, _solver, both_signs, ranks
from tests.algorithms.test_smoothing import SETTINGS, _by_loops, _noise_drawn, _randn, _seeded, _steps, every_setting
from torch import Tensor

import newton_plugin as npl
from newton_plugin import _errors
from newton_plugin._boundary.autograd_graph import known_hessian
from newton_plugin._derivatives import closed_forms
from newton_plugin._step import compute
from newton_plugin.algorithms import FenchelYoungLoss, StochasticSmoothing
from newton_plugin.algorithms._black_box.noise import Gaussian
from newton_plugin.algorithms._black_box.score_hessian import ScoreHessian

every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def _twice(value: Tensor, y: Tensor) -> Tensor:
    """The Hessian of each problem (N, m, m), by double backward."""
    (g,) = torch.autograd.grad(value.sum(), y, create_graph=True)
    columns = [torch.autograd.grad(c, y, retain_graph=True)[0].flatten(1) for c in g.flatten(1).sum(0)]
    return torch.stack(columns, -1)


def _written(value: Tensor) -> Any:
    known = None if value.grad_fn is None else known_hessian(value.grad_fn)
    assert known is not None
    return known[1]


def _check(value: Tensor, y: Tensor) -> None:
    written, want = _written(value), _twice(value, y)
    got = written()
    assert want.abs().max() > 0.01
    assert (got - want).abs().max() <= 1e-10 * want.abs().max()
    assert torch.equal(got, got.mT)
    vectors = _randn(3, *want.shape[:2], seed=9)
    torch.testing.assert_close(written.products(vectors), torch.einsum("nij,rnj->rni", want, vectors))


@every_setting
@pytest.mark.parametrize("shape", [(3, 4), (2, 2, 3), (1, 2)])
def test_a_smoothed_loss(noise: str, baseline: str, antithetic: bool, shape: tuple[int, ...]) -> None:
    options: dict[str, Any] = {"noise": noise, "baseline": baseline, "antithetic": antithetic}
    y = _randn(*shape, seed=1).requires_grad_()
    smooth = StochasticSmoothing(lambda z: _steps(z.flatten(1)), samples=6, sigma=0.7, generator=_seeded(), **options)
    value = smooth(y)
    _check(value, y)
    if len(shape) == 2:
        e = _noise_drawn(noise, y.detach(), 6, antithetic)
        _, _, hessian = _by_loops(noise, baseline, antithetic, y.detach(), e, 0.7)
        torch.testing.assert_close(_written(value)(), hessian, rtol=1e-10, atol=1e-10)


@both_signs
@every_reduction
@pytest.mark.parametrize(
    ("noise", "baseline", "antithetic"), [setting for setting in SETTINGS if setting[0] != "cauchy"]
)
def test_a_fenchel_young_loss(minimize: bool, reduction: str, noise: str, baseline: str, antithetic: bool) -> None:
    options: dict[str, Any] = {"noise": noise, "baseline": baseline, "antithetic": antithetic, "reduction": reduction}
    solver = _solver(lambda z: ranks(z.flatten(1)).reshape(z.shape), minimize)
    for shape in ((3, 4), (2, 2, 3)):
        y, t = _randn(*shape, seed=1).requires_grad_(), torch.zeros(shape)
        loss = FenchelYoungLoss(solver, samples=6, sigma=0.7, minimize=minimize, generator=_seeded(), **options)
        _check(loss(y, t), y)
    if baseline == "leave_one_out" and not antithetic:
        y, t = _randn(3, 4, seed=1).requires_grad_(), ranks(_randn(3, 4, seed=2)).double()
        loss = FenchelYoungLoss(solver, samples=5, sigma=0.7, minimize=minimize, generator=_seeded(), **options)
        _, _, hessian = _explicit(y.detach(), t, 0.7, 5, noise, minimize, _solver(ranks, minimize))
        share = 1 / 3 if reduction == "mean" else 1.0
        torch.testing.assert_close(_written(loss(y, t))(), share * hessian, rtol=1e-10, atol=1e-12)


def test_precision_is_that_of_the_samples() -> None:
    """Of float32 and half-precision problems the samples are float32, and what is made of them float64."""
    for dtype in (torch.float32, torch.float16):
        y = _randn(3, 4, seed=1).to(dtype).requires_grad_()
        value = StochasticSmoothing(_steps, samples=8, sigma=0.7, generator=_seeded())(y)
        hessian = _written(value)()
        assert hessian.dtype == torch.float64
        torch.testing.assert_close(hessian, _twice(value, y).double(), rtol=3e-3, atol=3e-3)


def _losses() -> list[Any]:
    """Losses of (N, 4) outputs, how a user reduces them, and the noise that each draws."""
    weights = torch.tensor([0.5, 2.0, -1.0, 0.0, 1.0, 3.0], dtype=torch.float64)
    smooth = lambda: StochasticSmoothing(_steps, samples=8, sigma=0.7, generator=_seeded())  # noqa: E731
    target = ranks(_randn(6, 4, seed=2)).double()

    def observed(reduction: str) -> Any:
        return lambda y: FenchelYoungLoss(ranks, samples=8, sigma=0.7, reduction=reduction, generator=_seeded())(
            y, target
        )

    return [
        pytest.param(lambda y: smooth()(y).mean(), "mean", id="smoothed, mean"),
        pytest.param(lambda y: smooth()(y).sum(), "sum", id="smoothed, sum"),
        pytest.param(lambda y: (smooth()(y) * weights).mean(), "mean", id="smoothed, weighted"),
        pytest.param(lambda y: smooth()(y), "mean", id="smoothed, each"),
        pytest.param(observed("mean"), "mean", id="observed, mean"),
        pytest.param(observed("sum"), "sum", id="observed, sum"),
        pytest.param(lambda y: (observed("none")(y) * weights).sum() / 6, "mean", id="observed, weighted"),
        pytest.param(observed("none"), "mean", id="observed, each"),
    ]


class _Unsloped(Gaussian):
    """A user's noise, which does not know the slope of its score."""

    slope = property(lambda self: (_ for _ in ()).throw(AttributeError("slope")))  # type: ignore[assignment]


@pytest.mark.parametrize("door", ["newton_loss", "LossHook"])
@pytest.mark.parametrize("structure", ["mean", "per_sample", "diagonal"])
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(("loss", "reduction"), _losses())
def test_steps_differentiate_once(
    loss: Any, reduction: Any, large: bool, structure: Any, door: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through both doors, formed or by products; against the dense Hessians of double backward."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the loss was differentiated twice, or its matrices were formed")

    x, model = _randn(6, 5, seed=1), torch.nn.Linear(5, 4).double()
    y = model(x).detach().requires_grad_()
    value = loss(y)
    each = value.ndim == 1
    (g,) = torch.autograd.grad(value.sum(), y, retain_graph=True)
    live = int(g.any(-1).sum())  # a sample of weight zero is none
    count = live if reduction == "mean" else 1
    g, h = (d if each else d * count for d in (g, _twice(value, y)))
    if structure != "per_sample":
        h = h.sum(0) / live
    if structure == "diagonal":
        h = torch.diag_embed(h.diagonal())
    values, vectors = torch.linalg.eigh(h)
    shifted = values + 0.3
    shifted = torch.where((shifted > 0).all(-1, keepdim=True), shifted, values.abs() + 0.3)
    step = (vectors @ ((vectors.mT @ g.unsqueeze(-1)) / shifted.unsqueeze(-1))).squeeze(-1)
    # A loss for each sample is the user's own: the mean that is taken here is over all six.
    want = (step / (6 if each and reduction == "mean" else count)).mT @ x

    monkeypatch.setattr(compute, "hessian_products", never)
    if large:
        monkeypatch.setattr(closed_forms, "_BLOCK_ELEMENTS", 0)
        monkeypatch.setattr(ScoreHessian, "__call__", never)
    options: dict[str, Any] = {"curvature": "hessian", "damping": 0.3, "structure": structure, "reduction": reduction}
    if door == "newton_loss":
        got = npl.newton_loss(loss, **options)(model(x))
    else:
        got = npl.LossHook(**options)(loss(model(x)).mean() if each else loss(model(x)))
    got.mean().backward()
    torch.testing.assert_close(model.weight.grad, want)
    torch.testing.assert_close(got.detach().mean(), value.detach().mean())


def test_a_noise_without_slope_is_differentiated_twice() -> None:
    y = _randn(3, 4, seed=1)
    steps = []
    for noise in ("gaussian", _Unsloped()):
        smooth = StochasticSmoothing(_steps, samples=8, sigma=0.7, noise=noise, generator=_seeded())
        leaf = y.clone().requires_grad_()
        assert (known_hessian(smooth(leaf).grad_fn) is None) == (noise != "gaussian")
        smooth = StochasticSmoothing(_steps, samples=8, sigma=0.7, noise=noise, generator=_seeded())
        steps.append(npl.newton_step(smooth, y, curvature="hessian", damping=0.3).step)
    torch.testing.assert_close(*steps)


def test_where_there_is_none_to_bring() -> None:
    y = _randn(3, 4, seed=1).requires_grad_()
    algorithm = StochasticSmoothing(ranks, samples=4, sigma=0.7)
    assert known_hessian(algorithm(y).grad_fn) is None
    for estimator in ("symmetric_score", "finite_difference"):
        smooth = StochasticSmoothing(torch.sign, samples=4, sigma=0.7, estimator=estimator)
        assert known_hessian(smooth(y[:, :1].clone()).grad_fn) is None
    smooth = StochasticSmoothing(_steps, samples=4, sigma=0.7)
    with torch.no_grad():
        assert smooth(y).grad_fn is None
    assert smooth(y.detach()).grad_fn is None
    # A loss outside the smoothing that is not linear has a Hessian of its own.
    y, t = _randn(3, 4, seed=1), torch.ones(3, dtype=torch.float64)
    nonlinear = lambda z: (StochasticSmoothing(_steps, samples=8, sigma=0.7, generator=_seeded())(z) - t).square()  # noqa: E731
    leaf = y.clone().requires_grad_()
    found = npl.newton_step(nonlinear, y, curvature="hessian", damping=0.3, structure="per_sample").curvature
    torch.testing.assert_close(found, _twice(nonlinear(leaf), leaf))


def test_transforms_leave_no_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their tensors are gone when anybody could ask."""
    marked = []
    monkeypatch.setattr(closed_forms, "mark_hessian", lambda *args: marked.append(args))
    y, t = _randn(2, 3).requires_grad_(), ranks(_randn(2, 3, seed=1))
    loss = lambda z, u: FenchelYoungLoss(ranks, samples=6, sigma=0.8, generator=_seeded())(z, u)  # noqa: E731
    torch.func.hessian(loss)(y, t)
    torch.func.vmap(lambda z, u: loss(z[None], u[None]), randomness="same")(y, t)
    assert not marked
    loss(y, t)
    assert len(marked) == 1


@pytest.mark.parametrize("curvature", [None, "fisher", "hessian"])
def test_the_solver_is_called_once(curvature: Any) -> None:
    calls = []

    def fn(z: Tensor) -> Tensor:
        calls.append(len(z))
        return _steps(z)

    model = torch.nn.Linear(5, 4).double()
    hook = (lambda loss: loss) if curvature is None else npl.LossHook(curvature=curvature, damping=0.3)
    for baseline, want in (("leave_one_out", [48]), ("value", [48, 6])):
        calls.clear()
        smooth = StochasticSmoothing(fn, samples=8, sigma=0.7, baseline=baseline)
        hook(smooth(model(_randn(6, 5))).mean()).backward()
        assert calls == want


def test_nothing_is_computed_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(ScoreHessian, "_terms", lambda self, dtype=None: asked.append(self))
    y = _randn(3, 4, seed=1).requires_grad_()
    StochasticSmoothing(_steps, samples=8, sigma=0.7)(y).mean().backward()
    npl.LossHook()(FenchelYoungLoss(ranks, samples=8, sigma=0.7)(y, torch.zeros(3, 4))).backward()
    assert not asked


def test_products_must_be_a_function() -> None:
    y = _randn(3, 4).requires_grad_()
    with pytest.raises(_errors.ArgumentTypeError, match=r"products must be a function of vectors or None; got int"):
        npl.with_hessian(y.square().sum(), y, lambda: torch.eye(4).expand(3, 4, 4), products=3)  # type: ignore[arg-type]


def test_products_of_other_samples_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closed_forms, "_BLOCK_ELEMENTS", 0)
    smooth = StochasticSmoothing(lambda z: _steps(z.flatten(1)), samples=4, sigma=0.7)
    with pytest.raises(_errors.ShapeError, match=r"\(N, m, m\) = \(6, 2, 2\).*got shape \(3, 4, 4\)"):
        npl.newton_step(lambda y: smooth(y).mean(), _randn(3, 2, 2), curvature="hessian", feature_dims=-1)
