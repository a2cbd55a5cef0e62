"""StochasticSmoothing against formulas written as loops, closed forms, quadrature; under torch.func and both doors."""

from __future__ import annotations

import doctest
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import newton_plugin as npl
from newton_plugin import _errors as errors
from newton_plugin.algorithms import StochasticSmoothing
from newton_plugin.algorithms._black_box import smoothing
from newton_plugin.algorithms._black_box.black_box import BASELINES
from newton_plugin.algorithms._black_box.noise import EULER, resolve_noise
from newton_plugin.algorithms._black_box.smoothing import ESTIMATORS

NOISES = ("gaussian", "gumbel", "cauchy")
SCORES = {
    "gaussian": (lambda e: e, lambda e: torch.ones_like(e)),
    "gumbel": (lambda e: 1 - torch.exp(-e - EULER), lambda e: torch.exp(-e - EULER)),
    "cauchy": (lambda e: 2 * e / (1 + e**2), lambda e: 2 * (1 - e**2) / (1 + e**2) ** 2),
}
SETTINGS = [
    (noise, baseline, antithetic)
    for noise, baseline, antithetic in itertools.product(NOISES, BASELINES, (False, True))
    if not (antithetic and noise == "gumbel")
]
every_setting = pytest.mark.parametrize(("noise", "baseline", "antithetic"), SETTINGS)
every_noise = pytest.mark.parametrize("noise", NOISES)


def _seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=_seeded(seed), dtype=torch.float64)


def _steps(y: Tensor) -> Tensor:
    """A piecewise constant loss with jumps everywhere: (K*N, m) -> (K*N,)."""
    return (2 * y).floor().sum(-1).abs() + 3 * (y[:, 0] > y[:, 1]).to(y.dtype)


def _noise_drawn(noise: str, y: Tensor, samples: int, antithetic: bool = False, seed: int = 0) -> Tensor:
    half = torch.empty((samples // 2 if antithetic else samples, *y.shape), dtype=y.dtype)
    e = resolve_noise(noise).sample(half, _seeded(seed))
    return torch.cat((e, -e)) if antithetic else e


def _by_loops(noise: str, baseline: str, antithetic: bool, y: Tensor, e: Tensor, sigma: float) -> Any:
    """Value, gradient and Hessian of each problem, as the papers write them."""
    samples, (n, m) = e.shape[0], y.shape
    value, gradient = torch.zeros(n, dtype=y.dtype), torch.zeros(n, m, dtype=y.dtype)
    hessian = torch.zeros(n, m, m, dtype=y.dtype)
    score, slope = SCORES[noise]
    for i in range(n):
        f = [_steps((y[i] + sigma * e[k, i]).unsqueeze(0)).item() for k in range(samples)]
        value[i] = sum(f) / samples
        for k in range(samples):
            left_out = {k, (k + samples // 2) % samples} if antithetic else {k}
            others = [f[j] for j in range(samples) if j not in left_out]
            own = {
                "none": 0.0,
                "value": _steps(y[i : i + 1]).item(),
                "leave_one_out": sum(others) / max(1, len(others)),
            }
            s, ds = score(e[k, i]), slope(e[k, i])
            gradient[i] += (f[k] - own[baseline]) * s / sigma / samples
            hessian[i] += (f[k] - own[baseline]) * (torch.outer(s, s) - torch.diag(ds)) / sigma**2 / samples
    return value, gradient, hessian


@every_setting
def test_estimates_are_the_formulas(noise: str, baseline: str, antithetic: bool) -> None:
    y, sigma = _randn(3, 4, seed=1).requires_grad_(), 0.7
    smooth = StochasticSmoothing(
        _steps, samples=6, sigma=sigma, noise=noise, baseline=baseline, antithetic=antithetic, generator=_seeded()
    )
    e = _noise_drawn(noise, y.detach(), 6, antithetic)
    value, gradient, hessian = _by_loops(noise, baseline, antithetic, y.detach(), e, sigma)
    got = smooth(y)
    torch.testing.assert_close(got.detach(), value)
    (g,) = torch.autograd.grad(got.sum(), y, create_graph=True)
    torch.testing.assert_close(g.detach(), gradient)
    for j in range(4):
        (row,) = torch.autograd.grad(g[:, j].sum(), y, retain_graph=True)
        torch.testing.assert_close(row, hessian[:, j])


def _jumps(y: Tensor) -> Tensor:
    """Two thresholds together and one alone: their mean under any noise is known."""
    return ((y[:, 0] > 0.3) & (y[:, 1] > -0.2)).to(y.dtype) - 0.5 * (y[:, 2] > 0.5).to(y.dtype)


def _jumps_smoothed(noise: str, sigma: float, y: Tensor) -> Tensor:
    z = {j: (y[j] - c) / sigma for j, c in enumerate((0.3, -0.2, 0.5))}

    def above(x: Tensor) -> Tensor:  # P(e > -x)
        if noise == "gaussian":
            return torch.special.ndtr(x)
        if noise == "cauchy":
            return 0.5 + torch.atan(x) / torch.pi
        return -torch.expm1(-torch.exp(x - EULER))

    return above(z[0]) * above(z[1]) - 0.5 * above(z[2])


def _assert_unbiased(estimates: Tensor, expected: Tensor, errors_allowed: float = 4.5) -> None:
    """Independent estimates (R, ...): their mean is within so many standard errors of the truth, and that says much."""
    error = estimates.std(0) / estimates.shape[0] ** 0.5
    assert (error < 0.12 * expected.abs().max()).all(), "too few estimates to tell"
    assert ((estimates.mean(0) - expected).abs() <= errors_allowed * error + 1e-12).all()


def _derivatives(smooth: StochasticSmoothing, y: Tensor) -> tuple[Tensor, Tensor]:
    y = y.clone().requires_grad_()
    (g,) = torch.autograd.grad(smooth(y).sum(), y, create_graph=True)
    rows = [torch.autograd.grad(g[:, j].sum(), y, retain_graph=True)[0] for j in range(y.shape[1])]
    return g.detach(), torch.stack(rows, 1)


@every_setting
def test_unbiased_where_the_mean_is_known(noise: str, baseline: str, antithetic: bool) -> None:
    """100,000 estimates from few samples each: a baseline that saw its own sample (K = 2!) would halve the result."""
    y, sigma = torch.tensor([0.4, -0.3, 0.2], dtype=torch.float64), 0.8
    smooth = StochasticSmoothing(
        _jumps,
        samples=4 if antithetic else 2,
        sigma=sigma,
        noise=noise,
        baseline=baseline,
        antithetic=antithetic,
        generator=_seeded(5),
    )
    gradient, hessian = _derivatives(smooth, y.expand(100_000, 3))
    _assert_unbiased(gradient, torch.func.grad(lambda z: _jumps_smoothed(noise, sigma, z))(y))
    _assert_unbiased(hessian, torch.func.hessian(lambda z: _jumps_smoothed(noise, sigma, z))(y))


def test_unbiased_for_a_quadratic_and_against_quadrature() -> None:
    a = torch.tensor([[1.0, 0.5], [0.5, -2.0]], dtype=torch.float64)
    y, sigma = torch.tensor([0.3, -0.6], dtype=torch.float64), 0.5
    nodes = torch.linspace(-8, 8, 401, dtype=torch.float64)
    weights = torch.softmax(-nodes.square() / 2, 0)

    def quadratic(z: Tensor) -> Tensor:
        return ((z @ a) * z).sum(-1)

    def waves(z: Tensor) -> Tensor:
        return torch.sin(3 * z[..., 0]) * torch.tanh(2 * z[..., 1])

    def by_quadrature(z: Tensor) -> Tensor:
        grid = z + sigma * torch.cartesian_prod(nodes, nodes)
        return (waves(grid) * torch.outer(weights, weights).flatten()).sum()

    for f, g, h in (
        (quadratic, 2 * a @ y, 2 * a),
        (waves, torch.func.grad(by_quadrature)(y), torch.func.hessian(by_quadrature)(y)),
    ):
        smooth = StochasticSmoothing(f, samples=4, sigma=sigma, antithetic=True, generator=_seeded(2))
        gradient, hessian = _derivatives(smooth, y.expand(60_000, 2))
        _assert_unbiased(gradient, g)
        _assert_unbiased(hessian, h)


def test_third_derivatives_too() -> None:
    """Of E (y + sigma e)^3 = y^3 + 3 sigma^2 y: 6."""
    smooth = StochasticSmoothing(lambda z: z**3, samples=2, sigma=1.0, generator=_seeded(1))

    def total(y: Tensor) -> Tensor:
        return smooth(y).sum()

    y = torch.full((200_000, 1), 0.5, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(total(y), y, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), y, create_graph=True)
    (third,) = torch.autograd.grad(h.sum(), y)
    _assert_unbiased(third.squeeze(-1), torch.tensor(6.0, dtype=torch.float64))


@every_noise
def test_an_algorithm_has_a_jacobian(noise: str) -> None:
    """fn with vectors: each output is smoothed like a loss of its own, and outer losses see all of it."""

    def ranks(y: Tensor) -> Tensor:
        return y.argsort(-1).argsort(-1)

    y = _randn(2, 3, seed=3)
    smooth = StochasticSmoothing(ranks, samples=7, sigma=0.6, noise=noise, generator=_seeded())
    jacobian = torch.func.jacrev(smooth)(y)
    for out in range(3):
        alone = StochasticSmoothing(
            lambda z, out=out: ranks(z)[:, out], samples=7, sigma=0.6, noise=noise, generator=_seeded()
        )
        torch.testing.assert_close(jacobian[:, out], torch.func.jacrev(alone)(y))

    # A loss on top: by the chain rule from J and the second derivatives of every output, the same samples.
    def outer(p: Tensor) -> Tensor:
        return (p**3).sum()

    def fresh(z: Tensor) -> Tensor:
        return StochasticSmoothing(ranks, samples=7, sigma=0.6, noise=noise, generator=_seeded())(z)

    p, j, second = fresh(y), torch.func.jacrev(fresh)(y), torch.func.hessian(fresh)(y)
    expected = torch.einsum("noia,no,nojb->iajb", j, 6 * p, j) + torch.einsum("noiajb,no->iajb", second, 3 * p**2)
    torch.testing.assert_close(torch.func.hessian(lambda z: outer(fresh(z)))(y), expected)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_way_to_differentiate_gives_the_same(estimator: str) -> None:
    y = _randn(2, 3, seed=4)

    def loss(z: Tensor) -> Tensor:
        smooth = StochasticSmoothing(
            lambda u: u.argsort(-1).argsort(-1), samples=8, sigma=0.9, estimator=estimator, generator=_seeded()
        )
        return (smooth(z) * torch.arange(3.0, dtype=torch.float64)).square().sum()

    leaf = y.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    probes = torch.eye(6, dtype=y.dtype).reshape(6, 2, 3)
    looped = torch.stack([torch.autograd.grad(g, leaf, v, retain_graph=True)[0] for v in probes])
    hessian = torch.autograd.functional.hessian(loss, y).reshape(6, 2, 3)  # type: ignore[union-attr]
    assert hessian.abs().max() > 0.1
    torch.testing.assert_close(looped, hessian)
    if (
        estimator != "finite_difference"
    ):  # the other one calls a solver in its backward, which torch batches only in torch.func
        torch.testing.assert_close(torch.autograd.grad(g, leaf, probes, is_grads_batched=True)[0], hessian)
    func = torch.func
    torch.testing.assert_close(func.grad(loss)(y), g.detach())
    torch.testing.assert_close(func.jacrev(loss)(y), g.detach())
    matrix = hessian.reshape(6, 6)
    torch.testing.assert_close(func.jacrev(func.jacrev(loss))(y).reshape(6, 6), matrix)
    torch.testing.assert_close(func.hessian(loss)(y).reshape(6, 6), matrix.mT)  # differences: not quite symmetric
    if estimator != "finite_difference":  # differences in forward mode go along other directions: another estimate
        torch.testing.assert_close(matrix, matrix.mT)
        torch.testing.assert_close(func.jacfwd(loss)(y), g.detach())
        torch.testing.assert_close(func.jacfwd(func.jacfwd(loss))(y).reshape(6, 6), matrix)


def test_forward_mode_of_differences() -> None:
    """Of a linear p there is one estimate only."""
    a = torch.tensor([[2.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    smooth, _ = _differenced(lambda z: z @ a, torch.zeros(1, 2, dtype=torch.float64))
    y = _randn(1, 2)
    torch.testing.assert_close(torch.func.jacfwd(smooth)(y).squeeze(), a)
    torch.testing.assert_close(torch.func.jacrev(smooth)(y).squeeze(), a)
    second = torch.func.jacfwd(torch.func.jacfwd(lambda z: smooth(z).square().sum() / 2))(y)
    torch.testing.assert_close(second.reshape(2, 2), a @ a)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_vmap_and_its_randomness(estimator: str) -> None:
    y = _randn(5, 1, 3, seed=4)
    calls: list[int] = []

    def solver(z: Tensor) -> Tensor:
        calls.append(len(z))
        return z.argsort(-1).argsort(-1)

    def smooth(z: Tensor) -> Tensor:
        return StochasticSmoothing(solver, samples=4, sigma=0.9, estimator=estimator, generator=_seeded())(z)

    def gradient(z: Tensor) -> Tensor:
        return torch.func.grad(lambda u: smooth(u).square().sum())(z)

    different = torch.func.vmap(gradient, randomness="different")(y)
    assert set(calls) == {20}  # 4 samples of 5 mapped copies, in one call
    torch.testing.assert_close(different.squeeze(1), gradient(y.squeeze(1)))
    same = torch.func.vmap(gradient, randomness="same")(y)
    torch.testing.assert_close(same, torch.stack([gradient(z) for z in y]))
    nested = torch.func.vmap(torch.func.vmap(smooth, randomness="different"), randomness="different")
    assert nested(y.reshape(5, 1, 1, 3)).shape == (5, 1, 1, 3)
    hessians = torch.func.vmap(torch.func.hessian(lambda u: smooth(u).square().sum()), randomness="different")(y)
    torch.testing.assert_close(
        hessians.reshape(5, 3, 3)[2],
        torch.func.hessian(lambda u: smooth(u).square().sum())(y.squeeze(1))[2, :, 2],
    )
    with pytest.raises(errors.ArgumentError, match=r"randomness='error', the default. Use vmap\(\.\.\., randomness"):
        torch.func.vmap(smooth)(y)
    torch.func.vmap(lambda s: (s * smooth(y[0])).sum())(torch.ones(3))  # nothing mapped reaches the noise: allowed


def test_value_is_the_mean_over_one_call_in_order() -> None:
    y = _randn(3, 2, 2)
    calls: list[Tensor] = []

    def fn(z: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        calls.append(z.clone())
        return z.flatten(1).sum(-1)

    got = StochasticSmoothing(fn, samples=5, sigma=0.1, generator=_seeded())(y)
    points = y + 0.1 * _noise_drawn("gaussian", y, 5)
    assert len(calls) == 1
    torch.testing.assert_close(calls[0], points.flatten(0, 1))
    torch.testing.assert_close(got, points.flatten(2).sum(-1).mean(0))


def test_black_boxes_may_leave_torch() -> None:
    y = _randn(3, 4).requires_grad_()
    results = []
    for fn in (
        lambda z: z.argsort(-1).argsort(-1),
        lambda z: z.numpy().argsort(-1).argsort(-1),
        lambda z: torch.from_numpy(z.numpy().argsort(-1).argsort(-1)).float(),
    ):
        value = StochasticSmoothing(fn, samples=4, sigma=0.5, generator=_seeded())(y)
        results.append(torch.cat((value, *torch.autograd.grad(value.square().sum(), y))).detach())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    for fn in (lambda z: z, lambda z: z.zero_(), lambda z: (z > 0).all(-1), lambda z: z[:, :0]):
        assert StochasticSmoothing(fn, samples=4, sigma=0.5, baseline="value")(y).isfinite().all()
    assert not (y == 0).any()  # fn wrote into what it was given


def test_a_seed_is_a_result_and_the_global_one_counts_too() -> None:
    y = _randn(2, 3)
    seeded = [StochasticSmoothing(_steps, samples=4, sigma=1.0, generator=_seeded(k))(y) for k in (0, 0, 1)]
    assert torch.equal(seeded[0], seeded[1])
    assert not torch.equal(seeded[0], seeded[2])
    smooth = StochasticSmoothing(_steps, samples=4, sigma=1.0)
    torch.manual_seed(0)
    first = smooth(y)
    assert not torch.equal(first, smooth(y))
    torch.manual_seed(0)
    assert torch.equal(first, smooth(y))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_precisions(estimator: str, dtype: torch.dtype) -> None:
    y = _randn(3, 4).to(dtype).requires_grad_()
    seen = []

    def solver(z: Tensor) -> Tensor:
        seen.append((z.dtype, (z @ z.mT).dtype))
        return z.argsort(-1).argsort(-1)

    gradients = []
    for enabled in (False, True):
        smooth = StochasticSmoothing(solver, samples=8, sigma=0.5, estimator=estimator, generator=_seeded())
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = smooth(y).square().sum()
        assert loss.dtype == torch.float32
        gradients += torch.autograd.grad(loss, y)
    assert gradients[0].dtype == dtype
    assert torch.equal(*gradients)
    assert set(seen) == {(torch.float32, torch.float32)}


def test_outputs_of_any_shape() -> None:
    y = _randn(3, 2, 2)
    for fn, shape in ((lambda z: z > 0, (3, 2, 2)), (lambda z: z[:, 0].reshape(-1, 1, 2), (3, 1, 2)), (_total, (3,))):
        assert StochasticSmoothing(fn, samples=2, sigma=1.0)(y).shape == shape
    assert StochasticSmoothing(torch.sign, samples=2, sigma=1.0)(_randn(3, 1)).shape == (3, 1)
    for estimator in ESTIMATORS:
        empty = torch.zeros(0, 4, requires_grad=True)
        out = StochasticSmoothing(torch.sign, samples=2, sigma=1.0, estimator=estimator)(empty)
        assert torch.autograd.grad(out.sum(), empty)[0].shape == out.shape == (0, 4)


def _total(z: Tensor) -> Tensor:
    return z.flatten(1).sum(-1)


@settings(deadline=None, derandomize=True, max_examples=15)
@given(st.floats(-1e3, 1e3), st.sampled_from(["leave_one_out", "value"]), st.sampled_from(NOISES))
def test_a_constant_added_to_fn_changes_no_derivative(constant: float, baseline: str, noise: str) -> None:
    y = _randn(2, 3).requires_grad_()
    both = []
    for c in (0.0, constant):
        smooth = StochasticSmoothing(
            lambda z, c=c: _steps(z) + c, samples=4, sigma=1.0, noise=noise, baseline=baseline, generator=_seeded()
        )
        (g,) = torch.autograd.grad(smooth(y).sum(), y, create_graph=True)
        both.append((g.detach(), torch.autograd.grad(g.square().sum(), y)[0]))
    torch.testing.assert_close(both[0], both[1], rtol=1e-6, atol=1e-6 * (1 + abs(constant)))


def test_baselines_and_mirror_images_reduce_variance() -> None:
    """f = 10 + linear: the constant is all noise without a baseline, and mirror images leave only the direction."""

    def spread(**options: Any) -> float:
        smooth = StochasticSmoothing(
            lambda z: 10 + z.sum(-1), samples=8, sigma=0.5, noise="gaussian", generator=_seeded(), **options
        )
        y = torch.zeros(4000, 3, dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(smooth(y).sum(), y)[0].var(0).mean().item()

    none, left_out, value = (spread(baseline=b) for b in ("none", "leave_one_out", "value"))
    mirrored = spread(baseline="none", antithetic=True)
    assert none > 20 * left_out
    assert none > 20 * value
    assert none > 20 * mirrored


# The estimator by finite differences.


def _differenced(fn: Any, y: Tensor, **options: Any) -> tuple[StochasticSmoothing, Tensor]:
    """With its first half of the noise, the one that is used in pairs."""
    smooth = StochasticSmoothing(
        fn, samples=6, sigma=0.7, estimator="finite_difference", generator=_seeded(), **options
    )
    return smooth, _noise_drawn("gaussian", y, 6)[:3]


def test_differences_are_the_formula() -> None:
    y, width = _randn(3, 4, seed=1), 0.9
    smooth, e = _differenced(lambda z: z.argsort(-1).argsort(-1), y, width=width)
    w = _randn(3, 4, seed=2)
    leaf = y.clone().requires_grad_()
    (g,) = torch.autograd.grad((smooth(leaf) * w).sum(), leaf)
    for i in range(3):
        size = w[i].square().mean().sqrt()
        h = width * 0.7
        expected = torch.zeros(4, dtype=torch.float64)
        for k in range(3):
            for sign in (1, -1):
                moved = y[i] + sign * h * w[i] / size + 0.7 * e[k, i]
                expected += sign * moved.argsort().argsort() * size / (2 * h) / 3
        torch.testing.assert_close(g[i], expected)


def test_differences_are_exact_for_a_cubic_potential() -> None:
    """p = y^2 is the gradient of y^3/3: first and second derivatives are those of the mean along each path."""
    y, w = _randn(2, 3, seed=1).requires_grad_(), _randn(2, 3, seed=2)
    smooth, e = _differenced(torch.square, y.detach())
    (g,) = torch.autograd.grad((smooth(y) * w).sum(), y, create_graph=True)
    torch.testing.assert_close(g, (2 * w * (y + 0.7 * e)).mean(0))
    (second,) = torch.autograd.grad(g.sum(), y)
    torch.testing.assert_close(second, 2 * w)


@pytest.mark.parametrize("width", [0.5, 1.0])
def test_the_bias_of_differences_is_of_second_order(width: float) -> None:
    """For p = y^3 it is ``h^2 w^3``, exactly, with w of root-mean-square one."""
    y, h = torch.full((1, 2), 0.3, dtype=torch.float64, requires_grad=True), width * 0.7
    w = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    smooth, e = _differenced(lambda z: z**3, y.detach(), width=width)
    (g,) = torch.autograd.grad((smooth(y) * w).sum(), y)
    torch.testing.assert_close(g - (3 * w * (y + 0.7 * e) ** 2).mean(0).detach(), h**2 * w**3)


def test_differences_converge_to_the_smoothed_gradient() -> None:
    """Softmax's own black box: argmax under Gumbel noise has the Jacobian of the softmax. A small width is unbiased."""
    y, w = torch.tensor([0.5, 0.0, -0.4], dtype=torch.float64), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    expected = torch.func.grad(lambda z: (torch.softmax(z, -1) * w).sum())(y)
    smooth = StochasticSmoothing(
        lambda z: torch.nn.functional.one_hot(z.argmax(-1), 3),
        samples=2,
        sigma=1.0,
        noise="gumbel",
        estimator="finite_difference",
        width=0.05,
        generator=_seeded(),
    )
    many = y.expand(100_000, 3).clone().requires_grad_()
    _assert_unbiased(torch.autograd.grad((smooth(many) * w).sum(), many)[0], expected)


@settings(deadline=None, derandomize=True, max_examples=15)
@given(st.sampled_from([1e-30, 1e-6, 1.0, 64.0, 1e25]))
def test_differences_do_not_see_the_scale_of_the_loss(scale: float) -> None:
    y = _randn(4, 3).requires_grad_()
    gradients = []
    for c in (1.0, scale):
        smooth, _ = _differenced(lambda z: z.argsort(-1).argsort(-1), y.detach())
        gradients.append(torch.autograd.grad(c * smooth(y).square().sum(), y)[0] / c)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_loss_that_asks_for_nothing_gets_zero() -> None:
    y = _randn(4, 3).requires_grad_()
    smooth, _ = _differenced(torch.sign, y.detach())
    w = torch.tensor([[1.0], [0.0], [1.0], [0.0]])
    (g,) = torch.autograd.grad((smooth(y) * w).sum(), y)
    assert (g[1::2] == 0).all()
    assert g.isfinite().all()


def test_calls_of_the_solver() -> None:
    calls: list[int] = []

    def solver(z: Tensor) -> Tensor:
        calls.append(len(z))
        return torch.sign(z)

    y = _randn(5, 3).requires_grad_()
    for estimator, expected in (("score", [40]), ("symmetric_score", [40]), ("finite_difference", [40, 40])):
        calls.clear()
        StochasticSmoothing(solver, samples=8, sigma=1.0, estimator=estimator)(y).sum().backward()
        assert calls == expected
    calls.clear()
    StochasticSmoothing(solver, samples=8, sigma=1.0, baseline="value")(y).sum().backward()
    assert calls == [40, 5]


# Under Newton Losses, through both doors.


def _newton_cases() -> list[Any]:
    return [(c, e) for c in ("hessian", "fisher") for e in ESTIMATORS]


@pytest.mark.parametrize(("curvature", "estimator"), _newton_cases())
@pytest.mark.parametrize("door", ["newton_loss", "LossHook"])
def test_newton_steps_use_the_estimate_of_the_same_samples(curvature: Any, estimator: str, door: str) -> None:
    """``(C + d I)^-1 g`` with C and g by torch.func from the same seed, against what reaches the parameters."""
    x, damping = _randn(6, 5, seed=1), 0.4
    model = torch.nn.Linear(5, 3).double()
    goal = torch.arange(3.0, dtype=torch.float64)

    def loss_of(y: Tensor) -> Tensor:  # of each sample
        smooth = StochasticSmoothing(
            lambda z: z.argsort(-1).argsort(-1), samples=16, sigma=0.8, estimator=estimator, generator=_seeded(3)
        )
        return (smooth(y) - goal).square().sum(-1)

    y = model(x).detach()
    gradient = torch.func.grad(lambda z: loss_of(z).sum())(y)
    if curvature == "fisher":
        c = gradient.mT @ gradient / 6
    else:
        blocks = torch.func.hessian(lambda z: loss_of(z).sum())(y)
        c = torch.stack([blocks[i, :, i] for i in range(6)]).mean(0)
        c = (c + c.mT) / 2
    # The generator starts afresh in each call of loss_of: the samples are the same.
    values, vectors = torch.linalg.eigh(c)
    shifted = values + damping if (values + damping > 0).all() else values.abs() + damping
    step = gradient @ (vectors / shifted) @ vectors.mT
    expected = (step / 6).mT @ x

    if door == "newton_loss":
        wrapped = npl.newton_loss(lambda z: loss_of(z).mean(), curvature=curvature, damping=damping)
        wrapped(model(x)).backward()
    else:
        hook = npl.LossHook(curvature=curvature, damping=damping)
        hook(loss_of(model(x)).mean()).backward()
        assert hook.diagnostics()["fallbacks"] == 0
    torch.testing.assert_close(model.weight.grad, expected)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("door", ["newton_loss", "LossHook"])
def test_a_smoothed_loss_steps_by_the_explicit_hessian(noise: str, door: str) -> None:
    """fn is the loss itself, one number for each problem; g and H by loops over samples, as in the paper."""
    x, model = _randn(5, 3, seed=1), torch.nn.Linear(3, 4).double()
    y = model(x).detach()
    _, g, h = _by_loops(noise, "leave_one_out", False, y, _noise_drawn(noise, y, 12), 0.7)
    smooth = StochasticSmoothing(_steps, samples=12, sigma=0.7, noise=noise, generator=_seeded())
    values, vectors = torch.linalg.eigh(h.mean(0))
    damping = 2.0
    shifted = values + damping if (values + damping > 0).all() else values.abs() + damping
    expected = (g @ (vectors / shifted) @ vectors.mT / 5).mT @ x
    if door == "newton_loss":
        npl.newton_loss(smooth, curvature="hessian", damping=damping)(model(x)).mean().backward()
    else:
        npl.LossHook(curvature="hessian", damping=damping)(smooth(model(x)).mean()).backward()
    torch.testing.assert_close(model.weight.grad, expected)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_graph_shows_where_outputs_meet_a_smoothed_loss(estimator: str) -> None:
    """The search finds the last layer, and nothing of the smoothing, through reshaping and half precision alike."""
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    for prepare in (lambda y: y, lambda y: y.reshape(-1, 2, 2), lambda y: y.bfloat16()):
        smooth = StochasticSmoothing(torch.sign, samples=4, sigma=1.0, estimator=estimator)
        hook = npl.LossHook(module=model, damping=1.0)
        hook(smooth(prepare(model(torch.randn(6, 5)))).flatten(1).square().sum(-1).mean()).backward()
        assert [key.split(":")[0] for key in hook.state_dict()["rules"]] == ["2"]
        assert all(p.grad is not None for p in model.parameters())


# What it refuses.


def _make(**options: Any) -> StochasticSmoothing:
    return StochasticSmoothing(**{"fn": torch.sign, "samples": 4, "sigma": 1.0, **options})


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"fn": 3}, errors.ArgumentTypeError, r"fn must be callable; got int"),
        ({"samples": 4.0}, errors.ArgumentTypeError, r"samples must be an int; got 4\.0"),
        ({"samples": 1}, errors.ArgumentError, r"samples must be at least 2 for baseline='leave_one_out'; got 1"),
        ({"samples": 0, "baseline": "none"}, errors.ArgumentError, r"samples must be at least 1 .* got 0"),
        ({"samples": 5, "antithetic": True}, errors.ArgumentError, r"at least 4, an even number .* got 5"),
        ({"samples": 2, "antithetic": True}, errors.ArgumentError, r"at least 4.*baseline='value' and 'none' need"),
        ({"samples": 3, "estimator": "finite_difference"}, errors.ArgumentError, r"samples must be even .* got 3"),
        ({"sigma": 0.0}, errors.ArgumentError, r"sigma must be positive and finite; got 0\.0"),
        ({"width": -1}, errors.ArgumentError, r"width must be positive.*in units of sigma"),
        ({"noise": "gumbel", "antithetic": True}, errors.ArgumentError, r"antithetic=True needs noise .*Gumbel\(\)"),
        ({"noise": 3}, errors.ArgumentTypeError, r"noise must be one of"),
        (
            {"estimator": "reparameterized"},
            errors.ArgumentError,
            r"estimator must be one of 'score', 'symmetric_score', 'fi",
        ),
        ({"baseline": "mean"}, errors.ArgumentError, r"baseline must be one of 'leave_one_out', 'value', 'none'"),
        ({"antithetic": 1}, errors.ArgumentError, r"antithetic must be one of True, False; got 1"),
        ({"generator": 0}, errors.ArgumentTypeError, r"generator must be a torch\.Generator or None; got 0"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        _make(**options)


def test_wrong_inputs_and_results() -> None:
    y = torch.zeros(3, 2)
    with pytest.raises(errors.ArgumentTypeError, match=r"y must have a floating-point dtype; got torch\.int64"):
        _make()(torch.zeros(3, 2, dtype=torch.long))
    with pytest.raises(errors.ShapeError, match=r"y must hold one problem for each sample, shape \(N, \.\.\.\)"):
        _make()(torch.tensor(1.0))
    with pytest.raises(
        errors.ShapeError, match=r"each of the 12 problems .*got \(2,\) for problems of shape \(12, 2\)"
    ):
        _make(fn=lambda z: z.sum(0))(y)
    with pytest.raises(errors.ShapeError, match=r"shape \(12, \.\.\.\); got \(\).*Do not reduce"):
        _make(fn=torch.sum)(y)
    with pytest.raises(errors.ArgumentTypeError, match=r"got tuple\. Choose one of its values: lambda y: fn\(y\)\[0\]"):
        _make(fn=lambda z: (z, z))(y)
    with pytest.raises(errors.ArgumentTypeError, match=r"fn must return a tensor \(or numpy array\); got list"):
        _make(fn=lambda z: z.tolist())(y)
    with pytest.raises(
        errors.NonFiniteError, match=r"fn returned NaN or infinity for \d+ of 12 problems\. The problem"
    ):
        _make(fn=torch.sqrt, generator=_seeded())(y)
    with pytest.raises(errors.NonFiniteError, match=r"for 4 of 12 problems\. 4 of the problems themselves are not fin"):
        _make(fn=torch.square)(torch.tensor([[0.0, 1.0], [float("nan"), 0.0], [2.0, 1.0]]))
    with pytest.raises(
        errors.ShapeError, match=r"finite_difference' needs fn to return a solution.*got \(\)\. If fn ret"
    ):
        _make(fn=lambda z: z.sum(-1), estimator="finite_difference")(y)


def test_repr_and_copies() -> None:
    import copy

    smooth = _make(estimator="finite_difference", antithetic=True, baseline="value", generator=_seeded())
    assert repr(smooth) == (
        "StochasticSmoothing(samples=4, sigma=1, noise=Gaussian(), estimator='finite_difference', width=1, "
        "antithetic=True, baseline='value')"
    )
    y = _randn(2, 3)
    assert torch.equal(copy.deepcopy(smooth)(y), smooth(y))
    assert not list(smooth.parameters())


def test_examples() -> None:
    assert doctest.testmod(smoothing).failed == 0
