r"""StochasticSmoothing: derivatives for a function that has none.

A shortest path, a ranking, a program in another language are piecewise constant or not differentiable at all. But the
mean over noisy inputs, ``F(y) = E f(y + sigma e)``, is smooth, and the K evaluations that estimate F also estimate its
derivatives. Let y0 be the current y, as a constant, and r the likelihood ratio of ``noise.py`` at d = y - y0::

    F(y) = E f(u) r(y)          estimated by    mean_k p_k  +  mean_k (p_k - b_k) (r_k(y) - 1)

where ``p_k = f(y0 + sigma e_k)`` and b is a baseline. At y = y0 every r is 1 and the second term is 0: the value is
the plain mean. But r is a function of y, so differentiating this expression once gives the score-function gradient,
twice its Hessian (Gaussian noise)::

    g = mean (p - b) e / sigma          H = mean (p - b) (e e^T - I) / sigma^2

and so on, from the same K samples, unbiased, by ordinary automatic differentiation. (In stochastic computation graphs
this is the "infinitely differentiable Monte Carlo estimator" of Foerster et al. 2018.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from newton_plugin._errors import ArgumentError, ShapeError, check_choice, check_positive
from newton_plugin._runtime.compiler import eager
from newton_plugin.algorithms._black_box.black_box import BASELINE, BlackBox, check_problems, features
from newton_plugin.algorithms._black_box.differences import smoothed_by_differences
from newton_plugin.algorithms._black_box.score_hessian import ScoreHessian, bring_hessian

__all__ = ["ESTIMATORS", "Smoothed", "Smoother", "StochasticSmoothing"]

ESTIMATORS = ("score", "symmetric_score", "finite_difference")


class Smoothed(NamedTuple):
    """The result of a :class:`Smoother`.

    Attributes:
        mean: differentiable, (N, ...).
        noise: (K, N, ...).
        values: the samples, (K, N, ...).
        advantages: samples minus their baseline, (K, N, q); None where the estimator has none.
    """

    mean: Tensor
    noise: Tensor
    values: Tensor
    advantages: Tensor | None


class Smoother:
    """A black box with an estimator: from problems to the smoothed value and the samples behind it."""

    def __init__(self, box: BlackBox, estimator: str, width: float) -> None:
        check_choice("estimator", estimator, ESTIMATORS)
        self.box, self.estimator = box, estimator
        self.width = check_positive("width", width, "It is the half-width of the difference, in units of sigma.")
        if estimator == "finite_difference" and box.samples % 2:
            raise ArgumentError(
                f"samples must be even for estimator='finite_difference', which evaluates pairs; got {box.samples}."
            )

    def __call__(self, y: Tensor) -> Smoothed:
        """The smoothed value of problems (N, ...), and what it was made of."""
        start = y.detach()
        noise = self.box.draw(start)
        values = self.box.solve(self.box.points(start, noise))
        with torch.autocast(y.device.type, enabled=False):
            if self.estimator != "score":
                self._check_solution(start, values)
            if self.estimator == "finite_difference":
                mean = values.mean(0)
                return Smoothed(smoothed_by_differences(self.box, self.width, y, noise, mean), noise, values, None)
            advantages = self.box.advantages(start, features(values, 2))
            return Smoothed(self._by_scores(y, start, noise, values, advantages), noise, values, advantages)

    def _by_scores(self, y: Tensor, start: Tensor, noise: Tensor, values: Tensor, advantages: Tensor) -> Tensor:
        e, density = features(noise, 2), self.box.density
        shift = features(y - start, 1) * (self.box.sign / self.box.sigma)
        weight = torch.expm1(density.log_ratio(e, shift)) / self.box.samples
        derivatives = torch.einsum("kn,knq->nq", weight, advantages)
        if self.estimator == "symmetric_score":
            # sum_k grad r_k <p_k - b_k, shift>, with r_k at half the shift. Its Jacobian is J^T, and its second
            # derivatives are those of the first term with their indices exchanged.
            along = torch.einsum("knm,nm->kn", advantages, shift / self.box.samples)
            weight = torch.exp(density.log_ratio(e, shift / 2)) * along
            derivatives = (derivatives + torch.einsum("knm,kn->nm", density.score(e - shift / 2), weight)) / 2
        return values.mean(0) + derivatives.reshape(values.shape[1:])

    def _check_solution(self, y: Tensor, values: Tensor) -> None:
        if values.shape[1:] == y.shape:
            return
        name = self.box.name
        raise ShapeError(
            f"estimator={self.estimator!r} needs {name} to return a solution shaped like its input, "
            f"{tuple(y.shape[1:])} for each problem; got {tuple(values.shape[2:])}. If {name} returns a loss, smooth "
            "the solver inside it and put the loss outside, loss(smoothed(y)); or use estimator='score'."
        )

    def describe(self) -> str:
        """The arguments that differ from their defaults, for ``repr``."""
        box = self.box
        parts = [f"samples={box.samples}, sigma={box.sigma:g}, noise={box.density!r}"]
        parts += [f"estimator={self.estimator!r}"] * (self.estimator != "score")
        parts += [f"width={self.width:g}"] * (self.estimator == "finite_difference")
        parts += ["antithetic=True"] * box.antithetic + [f"baseline={box.baseline!r}"] * (box.baseline != BASELINE)
        return ", ".join(parts + ["minimize=True"] * box.minimize)


class StochasticSmoothing(torch.nn.Module):
    r"""The mean of any function over noisy inputs, with gradient and Hessian.

    .. math:: F(y) = \mathbb{E}\, f(y + \sigma e) \approx \tfrac1K \textstyle\sum_k f(y + \sigma e_k)

    Args:
        fn: (K*N, ...) -> (K*N,) (a loss: one number for each problem) or (K*N, ...) (an algorithm: a solution for
            each problem). It is called once, under ``no_grad``, with all K noisy copies of all N problems, those
            of the first copy first. May compute in numpy; floating point, integers and booleans may come back.
        samples: K.
        sigma: scale of the noise, in units of y. Larger is smoother and further from fn.
        noise: "gaussian", "gumbel" (with mean zero), "cauchy", or an object with their methods.
        estimator: "score" works for any fn. For an fn that solves a linear problem (see below) two others have less
            noise: "symmetric_score", unbiased as well, and "finite_difference", by far the most exact with few
            samples, with a bias of O(h^2), h = width * sigma, and as many calls again in the backward.
        antithetic: K/2 draws and their mirror images (not for "gumbel").
        baseline: what is subtracted from the samples in the derivatives: the mean of the *other* samples
            ("leave_one_out"), f(y) itself ("value": one more call, with the N problems), or "none". Each is
            unbiased; they differ in variance.
        generator: draws the noise; None: torch's global one. One on the CPU serves every device.
        width: half-width of the difference in units of sigma ("finite_difference" only).

    Call it with y (N, ...), floating point and at least two-dimensional: a vector is refused, because it could be one
    problem, ``y.unsqueeze(0)``, or N of one number each, ``y.unsqueeze(-1)``. The result has the shape of fn's,
    (N, ...), and the dtype of y (float32 for half precision). Under autocast fn and the estimators compute in that
    dtype.

    **Derivatives** of every order by ``backward``, double backward and ``torch.func``, from the same samples; with
    "score" they are unbiased for F. A function of the result is another matter: with a loss l that is not linear,
    ``l(F)`` is estimated by ``l(mean)``, biased by O(1/K) like any function of a mean. Under ``torch.func.vmap``
    pass ``randomness="different"`` or ``"same"``.

    **Solvers of linear problems**, an fn that returns ``argmax_p <y, p>`` or ``argmin_p <y, p>`` shaped like y (a
    shortest path, an assignment, a ranking, top-k), have a symmetric Jacobian J. "symmetric_score" averages the
    estimates of J and its transpose (differentiable twice). With "finite_difference", the gradient w that arrives from
    the loss is propagated by a *directional* derivative of the solution, the difference of smoothed solutions at
    ``y + h w`` and ``y - h w`` (w scaled to root-mean-square one). Each backward calls fn with K*N problems more, a
    Hessian of m outputs with 2 m K N. For any other fn both are wrong: half of the result, or all of it, is ``J w``
    where ``J^T w`` is needed. A loss that is linear in the solution (the Hamming distance to a 0/1 target,
    ``(p * (1 - 2 * target) + target).sum(-1)``; the true cost of a path) means the same inside fn and outside of the
    smoothing; outside, these estimators can be used.

    Raises:
        ArgumentError, ArgumentTypeError: an argument outside its rule.
        ShapeError: y has fewer than two dimensions; fn did not return one row for each problem; a loss where a
            solution is needed.
        NonFiniteError: fn returned NaN or infinity. (For this check the host waits for the device once a call.)

    Source: Petersen et al., "Newton Losses", NeurIPS 2024, section on stochastic smoothing; Glynn 1990 and Williams
    1992 for the score function, Kool et al. 2019 for the leave-one-out baseline.

    The square of a number has a smoothed version: E (y + sigma e)^2 = y^2 + sigma^2, with slope 2 y. Here fn takes
    100,000 noisy copies of the problems 1 and 2:

    >>> seeded = torch.Generator().manual_seed(0)
    >>> smooth = StochasticSmoothing(torch.square, samples=100_000, sigma=0.5, generator=seeded)
    >>> y = torch.tensor([[1.0], [2.0]], requires_grad=True)
    >>> value = smooth(y)
    >>> [round(v, 1) for v in value.flatten().tolist()]
    [1.2, 4.2]
    >>> [round(v, 1) for v in torch.autograd.grad(value.sum(), y)[0].flatten().tolist()]
    [2.0, 4.0]
    """

    def __init__(
        self,
        fn: Callable[[Tensor], Any],
        *,
        samples: int,
        sigma: float,
        noise: Any = "gaussian",
        estimator: str = "score",
        antithetic: bool = False,
        baseline: str = BASELINE,
        generator: torch.Generator | None = None,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        self.fn = fn
        box = BlackBox(fn, samples, sigma, noise, antithetic, baseline, generator)
        self._smoother = Smoother(box, estimator, width)

    def extra_repr(self) -> str:
        """The arguments."""
        return self._smoother.describe()

    @eager
    def forward(self, y: Tensor) -> Tensor:
        """The smoothed fn at y (N, ...)."""
        value, noise, values, advantages = self._smoother(check_problems(y))
        if values.ndim > 2 or advantages is None or self._smoother.estimator != "score":
            return value  # fn is not a loss, or its Hessian is not that of the score function
        hessian = ScoreHessian(self._smoother.box, noise, advantages, smoothed=True)
        return bring_hessian(value, y, hessian, self._smoother.box)
