r"""FenchelYoungLoss: learn the costs of an optimisation problem from observed solutions.

This is cross-entropy for arbitrary solvers. Let t be the solution that was observed, and let
``M(y) = E max_p <y + sigma e, p>`` be the smoothed maximum. Its gradient is the mean solution P(y): the solver's answer
attains the maximum. The loss is convex in y, and its gradient is the difference of two solutions::

    loss(y, t) = M(y) - <y, t>          g = P(y) - t          H = dP/dy

No derivative of the solver is needed for g, and the noise of the estimate is that of a mean of solutions. For a
minimiser, ``m(y) = E min_p <y - sigma e, p>``, all signs turn::

    loss(y, t) = <y, t> - m(y)          g = t - P(y)          H = -dP/dy

**The value** is reported as ``mean_k <y_k, p_k - t>`` (minimising: ``<y_k, t - p_k>``) over the noisy problems
``y_k``: how much better the solver does than t, on average. Noise has mean zero, so in expectation that is the loss
above. Unlike the formula above it is never negative, even for one sample, and zero only if t is optimal in every noisy
problem.

**The Hessian** comes from the same samples. ``H = mean (p_k - b_k) e_k^T / sigma`` (for Gaussian noise; -1/sigma with
``y + sigma e`` for a minimiser) is symmetric in the limit but not for K samples, so it is symmetrised. In code, with
the differentiable mean solution P(y) of ``perturbed.py``, the current y as a constant y0, and ``d = y - y0``::

    value + < (P(y) + P(y0)) / 2 - t, d >

has at y = y0 the gradient ``P - t`` and the Hessian ``(J + J^T) / 2``, which a Newton step gets in closed form
(``score_hessian.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from newton_plugin._errors import ArgumentError, ArgumentTypeError, ShapeError, check_choice
from newton_plugin._runtime.compiler import eager
from newton_plugin.algorithms._black_box.black_box import BASELINE, BlackBox, check_problems, features
from newton_plugin.algorithms._black_box.perturbed import solve_perturbed
from newton_plugin.algorithms._black_box.score_hessian import ScoreHessian, bring_hessian
from newton_plugin.algorithms._black_box.smoothing import Smoother

__all__ = ["FenchelYoungLoss"]


class FenchelYoungLoss(torch.nn.Module):
    r"""The Fenchel-Young loss of a perturbed solver, twice differentiable.

    .. math:: \ell(y, t) = \mathbb{E} \max_p \langle y + \sigma e, p \rangle - \langle y, t \rangle
              \quad\text{or}\quad \langle y, t \rangle - \mathbb{E} \min_p \langle y - \sigma e, p \rangle

    Args:
        solver: (K*N, ...) -> solutions of the same shape; see :class:`PerturbedOptimizer`.
        samples: K. The gradient is good with few (3 is common); the Hessian, a covariance, wants more.
        sigma: scale of the noise, in units of y.
        noise: "gaussian" or "gumbel" (not "cauchy": its mean, and so this loss, is infinite).
        minimize: the solver minimises, e.g. costs.
        reduction: "mean" or "sum" over the N problems, or "none".
        antithetic, baseline, generator: see :class:`StochasticSmoothing`; the baseline concerns the Hessian only.

    Call it with y (N, ...) and the observed solutions target (N, ...): a scalar (or (N,) for "none"), never negative,
    zero where the target is optimal in every noisy problem. The constant that would make the minimum over y zero for
    targets inside the hull is left out, as it does not depend on y. (Of a solver with a regulariser, ``max <y, p> -
    Omega(p)``, the gradient and the Hessian are right and the value lacks the terms in Omega.)

    Differentiate it once or twice, by ``backward`` or ``torch.func``; third derivatives are not implemented.

    Raises:
        ArgumentError, ArgumentTypeError, NonFiniteError: see :class:`StochasticSmoothing`.
        ShapeError: y has fewer than two dimensions (one problem is ``y.unsqueeze(0)``); a solution or the target is not
            shaped like y.

    Source: Berthet et al., "Learning with differentiable perturbed optimizers", NeurIPS 2020 (its Fenchel-Young
    losses); Blondel, Martins, Niculae, "Learning with Fenchel-Young losses", JMLR 2020.

    With the highest score as solver and Gumbel noise it is sigma times the cross-entropy of y / sigma:

    >>> def highest(scores):
    ...     return torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1])
    >>> seeded = torch.Generator().manual_seed(0)
    >>> loss = FenchelYoungLoss(highest, samples=100_000, sigma=1.0, noise="gumbel", generator=seeded)
    >>> y, target = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    >>> round(loss(y, target).item(), 2), round(torch.nn.functional.cross_entropy(y, target).item(), 2)
    (1.41, 1.41)
    """

    def __init__(
        self,
        solver: Callable[[Tensor], Any],
        *,
        samples: int,
        sigma: float,
        noise: Any = "gaussian",
        minimize: bool = False,
        reduction: str = "mean",
        antithetic: bool = False,
        baseline: str = BASELINE,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.solver, self.reduction = solver, reduction
        box = BlackBox(solver, samples, sigma, noise, antithetic, baseline, generator, minimize, "solver")
        if not box.density.has_mean:
            raise ArgumentError(
                f"noise of FenchelYoungLoss must have a mean, or the loss is infinite; got {box.density!r}. Use "
                "'gaussian' or 'gumbel', or PerturbedOptimizer under a loss of your own."
            )
        self._smoother = Smoother(box, "score", 1.0)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{self._smoother.describe()}, reduction={self.reduction!r}"

    @eager
    def forward(self, y: Tensor, target: Tensor) -> Tensor:
        """The loss of y (N, ...) given observed solutions (N, ...)."""
        outputs, y = y, check_problems(y)
        target = _check_target(target, y)
        mean, noise, solutions, advantages = solve_perturbed(self._smoother, y)
        box, start = self._smoother.box, y.detach()
        with torch.autocast(y.device.type, enabled=False):
            regret = box.points(start, noise) * (solutions - target)
            slope = ((mean + mean.detach()) / 2 - target) * (y - start)
            loss = box.sign * (features(regret, 2).sum(-1).mean(0) + features(slope, 1).sum(-1))
        assert advantages is not None
        weight = 1 / max(1, loss.numel()) if self.reduction == "mean" else 1.0
        if self.reduction != "none":
            loss = loss.mean() if self.reduction == "mean" else loss.sum()
        return bring_hessian(loss, outputs, ScoreHessian(box, noise, advantages, smoothed=False, weight=weight), box)


def _check_target(target: Any, y: Tensor) -> Tensor:
    if not isinstance(target, Tensor):
        raise ArgumentTypeError(f"target must be a tensor of solutions; got {type(target).__name__}.")
    if target.is_complex():
        raise ArgumentTypeError(f"target must hold real solutions; got {target.dtype}.")
    if target.shape != y.shape:
        raise ShapeError(
            f"target must be a solution for each problem, shaped like y; got {tuple(target.shape)} and "
            f"{tuple(y.shape)}. Class indices become solutions by torch.nn.functional.one_hot."
        )
    return target.to(y.dtype)
