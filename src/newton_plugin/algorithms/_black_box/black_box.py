"""A black box, evaluated at K noisy copies of every problem in one call.

Every estimator of this family does the same first: draw the noise ``e`` (K, N, ...), form the points
``u = y + sigma e`` (``y - sigma e`` for a minimiser), and pass all K*N of them to the user's function at once.
The function sees plain tensors, under ``no_grad``; it may leave torch for numpy, scipy or a C library.

Drawing and evaluating are two autograd.Functions *without* derivative, because this is how a function tells
``torch.func`` what to do. Under ``vmap`` the mapped copies become more problems of the same call; ``randomness=``
decides whether they share their noise. Under ``grad``, ``jacrev`` and ``hessian`` there is one draw and one call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from newton_plugin._errors import (
    ArgumentError,
    ArgumentTypeError,
    NonFiniteError,
    ShapeError,
    check_choice,
    check_floating,
    check_positive,
)
from newton_plugin._runtime.compiler import untraced
from newton_plugin.algorithms._black_box.noise import Noise, resolve_noise

__all__ = ["BASELINE", "BASELINES", "BlackBox", "check_problems", "features"]

BASELINES = ("leave_one_out", "value", "none")
BASELINE = "leave_one_out"  # the default


@dataclass(eq=False)
class BlackBox:
    """The function and how it is sampled; the arguments are those of ``StochasticSmoothing``.

    Attributes:
        minimize: subtract the noise instead of adding it.
        name: what the user calls ``fn``, for messages.
        density: the object that ``noise`` names.
    """

    fn: Callable[[Tensor], Any]
    samples: int
    sigma: float
    noise: Any = "gaussian"
    antithetic: bool = False
    baseline: str = BASELINE
    generator: torch.Generator | None = None
    minimize: bool = False
    name: str = "fn"
    density: Noise = field(init=False)

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise ArgumentTypeError(f"{self.name} must be callable; got {type(self.fn).__name__}.")
        if isinstance(self.samples, bool) or not isinstance(self.samples, int):
            raise ArgumentTypeError(f"samples must be an int; got {self.samples!r}.")
        self.sigma = check_positive("sigma", self.sigma, "It is the scale of the noise, in units of the inputs.")
        self.density = resolve_noise(self.noise)
        check_choice("antithetic", self.antithetic, (True, False))
        check_choice("minimize", self.minimize, (True, False))
        check_choice("baseline", self.baseline, BASELINES)
        if not (self.generator is None or isinstance(self.generator, torch.Generator)):
            raise ArgumentTypeError(f"generator must be a torch.Generator or None; got {self.generator!r}.")
        if self.antithetic and not self.density.symmetric:
            raise ArgumentError(
                f"antithetic=True needs noise for which e and -e are equally likely; got {self.density!r}. "
                "Use noise='gaussian' or 'cauchy'."
            )
        self._check_samples()

    def _check_samples(self) -> None:
        group = 2 if self.antithetic else 1
        least = 2 * group if self.baseline == "leave_one_out" else group
        if self.samples < least or self.samples % group:
            pairs = ", an even number with antithetic=True," if self.antithetic else ""
            raise ArgumentError(
                f"samples must be at least {least}{pairs} for baseline={self.baseline!r}; got {self.samples}. "
                "baseline='value' and 'none' need fewer, with more noise in the derivatives."
            )

    @property
    def sign(self) -> int:
        """The sign of the noise: +1, or -1 for a minimiser."""
        return -1 if self.minimize else 1

    def draw(self, y: Tensor) -> Tensor:
        """Noise (K, N, ...) for problems y (N, ...); the second half mirrors the first if antithetic."""
        return _Draw.apply(y, self)  # type: ignore[return-value]

    def points(self, y: Tensor, noise: Tensor) -> Tensor:
        """The points at which fn is evaluated, (K, N, ...)."""
        return torch.add(y, noise, alpha=self.sign * self.sigma)

    def solve(self, points: Tensor) -> Tensor:
        """``fn`` at points (K, N, ...), in one call: (K, N, ...) of its own trailing shape."""
        return _Solve.apply(points, self)  # type: ignore[return-value]

    def advantages(self, y: Tensor, values: Tensor) -> Tensor:
        """Values (K, N, q) minus a baseline that does not depend on their own noise.

        Any such baseline leaves the derivatives unbiased, because the weights have mean zero. Leave-one-out: the
        mean over the other samples, ``b_k = (sum p - p_k) / (K - 1)``, so ``p_k - b_k = K (p_k - mean p) / (K - 1)``.
        (The mean over *all* samples contains p_k and shrinks every derivative by (K - 1)/K.) Of antithetic pairs
        both members are left out.
        """
        if self.baseline == "none":
            return values
        if self.baseline == "value":
            # A copy: fn may write into what it is given.
            return values - features(self.solve(y.unsqueeze(0).clone()), 2)
        k = self.samples
        if not self.antithetic:
            return (values - values.mean(0)) * (k / (k - 1))
        first, second = values.chunk(2)
        others = (values.sum(0) - first - second) / (k - 2)
        return values - torch.cat((others, others))

    def call(self, problems: Tensor) -> Tensor:
        """``fn`` at problems (K*N, ...): checked, in the dtype and on the device of the problems."""
        with torch.no_grad(), torch.autocast(problems.device.type, enabled=False):
            result = self.fn(problems)
        expected = problems.shape[0]
        if not isinstance(result, Tensor) and not hasattr(result, "__array__"):
            hint = f" Choose one of its values: lambda y: {self.name}(y)[0]." if isinstance(result, tuple) else ""
            raise ArgumentTypeError(
                f"{self.name} must return a tensor (or numpy array); got {type(result).__name__}.{hint}"
            )
        result = torch.as_tensor(result, device=problems.device).detach()
        if result.ndim == 0 or result.shape[0] != expected:
            raise ShapeError(
                f"{self.name} must return one value or solution for each of the {expected} problems it was called "
                f"with (samples * N, one call), shape ({expected}, ...); got {tuple(result.shape)} for problems of "
                f"shape {tuple(problems.shape)}. Do not reduce over the first dimension."
            )
        result = result.to(problems.dtype)
        finite = torch.isfinite(result)
        if not bool(finite.all()):  # waits for the device, as an error has to
            bad = int((~features(finite, 1).all(-1)).sum())
            asked = int((~torch.isfinite(features(problems, 1)).all(-1)).sum())
            cause = (
                f"{asked} of the problems themselves are not finite: look at the network's outputs."
                if asked
                else "The problems were finite: does it handle inputs moved by the noise, e.g. negative costs?"
            )
            raise NonFiniteError(f"{self.name} returned NaN or infinity for {bad} of {expected} problems. {cause}")
        return result


def features(tensor: Tensor, leading: int) -> Tensor:
    """All dimensions behind the ``leading`` ones as one, of length 1 if there are none."""
    return tensor.flatten(leading) if tensor.ndim > leading else tensor.unsqueeze(leading)


def check_problems(y: Any) -> Tensor:
    """Raise unless y is (N, ...), at least two-dimensional and floating; return it, float32 if in half precision.

    A vector could be one problem or many problems of one number. A solver means the first, so neither is guessed.
    """
    check_floating("y", y)
    if y.ndim < 2:
        remedy = (
            f"One problem of {len(y)} numbers is y.unsqueeze(0); {len(y)} problems of one number each are "
            "y.unsqueeze(-1)."
            if y.ndim
            else "One problem of one number is y.reshape(1, 1)."
        )
        raise ShapeError(
            "y must hold one problem for each sample, shape (N, ...) with two dimensions or more; "
            f"got {tuple(y.shape)}. {remedy}"
        )
    return y.float() if y.element_size() < 4 else y


class _Constant(torch.autograd.Function):
    """A function whose derivative is zero by definition."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return None, None

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Any:
        return None


@untraced
class _Draw(_Constant):
    """Noise for y."""

    @staticmethod
    def forward(y: Tensor, box: BlackBox) -> Tensor:
        count = box.samples // 2 if box.antithetic else box.samples
        # A generator draws on its own device: one on the CPU gives the same noise to every device.
        device = y.device if box.generator is None else box.generator.device
        like = torch.empty((count, *y.shape), dtype=y.dtype, device=device)
        noise = box.density.sample(like, box.generator).to(y.device)
        return torch.cat((noise, -noise)) if box.antithetic else noise

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int | None]:
        y, box = args
        if info.randomness == "error":
            raise ArgumentError(
                "torch.func.vmap over a smoothed function must say what becomes of its noise; got "
                "randomness='error', the default. Use vmap(..., randomness='different') for noise of its own in "
                "every mapped copy, or 'same'."
            )
        if info.randomness == "same":
            return box.draw(y.select(in_dims[0], 0)), None
        y = y.movedim(in_dims[0], 0)
        return box.draw(y.flatten(0, 1)).unflatten(1, y.shape[:2]), 1


@untraced
class _Solve(_Constant):
    """The black box at points (K, N, ...)."""

    @staticmethod
    def forward(points: Tensor, box: BlackBox) -> Tensor:
        return box.call(points.flatten(0, 1)).unflatten(0, points.shape[:2])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        points, box = args
        points = points.movedim(in_dims[0], 1)
        return box.solve(points.flatten(1, 2)).unflatten(1, points.shape[1:3]), 1
