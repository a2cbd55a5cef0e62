r"""PerturbedOptimizer: the mean solution of a noisy optimisation problem.

Many losses end in a solver of a linear problem over finitely many candidates, ``p(y) = argmax_p <y, p>``: the class
of highest score (p one-hot), a shortest path, a matching, a ranking. Noise on y turns the jump between two solutions
into a probability::

    P(y) = E argmax_p <y + sigma e, p>          J = E p (grad log-density)^T, as in ``smoothing.py``

With Gumbel noise and one-hot p this is ``softmax(y / sigma)``, exactly. A minimiser, ``argmin_p <y, p>``, is the
maximiser at -y, so its noise is subtracted, ``argmin_p <y - sigma e, p>``; with Gumbel noise that is
``softmax(-y / sigma)``. For symmetric noise the sign does not change the distribution.

P is the gradient of the smoothed maximum ``E max_p <y + sigma e, p>``, so its Jacobian is symmetric. That allows
better estimators than the paper's: the mean of J and its transpose, and the differences of ``differences.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from newton_plugin._errors import ShapeError
from newton_plugin._runtime.compiler import eager
from newton_plugin.algorithms._black_box.black_box import BASELINE, BlackBox, check_problems
from newton_plugin.algorithms._black_box.smoothing import Smoothed, Smoother

__all__ = ["PerturbedOptimizer", "solve_perturbed"]


class PerturbedOptimizer(torch.nn.Module):
    r"""The mean solution under noise, differentiable any number of times.

    .. math:: P(y) = \mathbb{E} \arg\max_p \langle y + \sigma e, p\rangle
              \quad\text{or}\quad \mathbb{E} \arg\min_p \langle y - \sigma e, p\rangle

    Args:
        solver: (K*N, ...) -> solutions of the same shape, called once, under ``no_grad``, with all noisy copies of
            all problems. It must maximise (minimise) the inner product with its input over a fixed set.
        samples: K.
        sigma: scale of the noise, in units of y.
        noise: "gaussian", "gumbel" (with mean zero) or "cauchy".
        minimize: the solver minimises, e.g. costs.
        generator, antithetic, baseline, width: see :class:`StochasticSmoothing`.
        estimator: of the derivatives: "score" (the paper's), "symmetric_score" or "finite_difference", see there.

    Call it with y (N, ...); the result has its shape. Noise makes some inputs of a solver negative even where y is
    positive; a solver that refuses those needs a bound, ``lambda c: solver(c.clamp(min=0))``.

    Raises:
        ArgumentError, ArgumentTypeError, NonFiniteError: see :class:`StochasticSmoothing`.
        ShapeError: y has fewer than two dimensions (one problem is ``y.unsqueeze(0)``); a solution is not shaped like
            its problem.

    Source: Berthet, Blondel, Teboul, Cuturi, Vert, Bach, "Learning with differentiable perturbed optimizers",
    NeurIPS 2020 (perturbed maximizers and their Jacobians).

    The class of highest score, under Gumbel noise, is the softmax:

    >>> def highest(scores):
    ...     return torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1])
    >>> seeded = torch.Generator().manual_seed(0)
    >>> soft = PerturbedOptimizer(highest, samples=100_000, sigma=1.0, noise="gumbel", generator=seeded)
    >>> y = torch.tensor([[0.0, 1.0, 2.0]])
    >>> torch.allclose(soft(y), torch.softmax(y, -1), atol=0.005)
    True
    """

    def __init__(
        self,
        solver: Callable[[Tensor], Any],
        *,
        samples: int,
        sigma: float,
        noise: Any = "gaussian",
        minimize: bool = False,
        generator: torch.Generator | None = None,
        estimator: str = "score",
        antithetic: bool = False,
        baseline: str = BASELINE,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        self.solver = solver
        box = BlackBox(solver, samples, sigma, noise, antithetic, baseline, generator, minimize, "solver")
        self._smoother = Smoother(box, estimator, width)

    def extra_repr(self) -> str:
        """The arguments."""
        return self._smoother.describe()

    @eager
    def forward(self, y: Tensor) -> Tensor:
        """The mean solution at y (N, ...)."""
        return solve_perturbed(self._smoother, check_problems(y)).mean


def solve_perturbed(smoother: Smoother, y: Tensor) -> Smoothed:
    """The result of ``smoother``; raise unless the solutions have the shape of the problems."""
    smoothed = smoother(y)
    mean = smoothed.mean
    if mean.shape != y.shape:
        raise ShapeError(
            f"solver must return solutions shaped like its problems, {tuple(y.shape[1:])} each; got "
            f"{tuple(mean.shape[1:])}. To smooth a function that returns something else, use StochasticSmoothing."
        )
    return smoothed
