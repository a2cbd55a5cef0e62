r"""Noise to smooth with: how to draw it, and its likelihood ratio when y moves.

Smoothing turns any function into ``F(y) = E f(y + sigma e)``, ``e`` drawn from a density ``mu``. Written as an
integral over the points ``u = y + sigma e`` at which f is evaluated, F depends on y through the density alone::

    F(y + d) = E f(u) mu(e - d / sigma) / mu(e)

The likelihood ratio is 1 at d = 0, and its derivatives there are the weights of the score-function method:

===========  ========================  =============================  ==========================
noise        log density               score  s = -(log mu)'          s' (second-order score:
                                                                      s s^T - diag(s'))
===========  ========================  =============================  ==========================
gaussian     -e^2 / 2                  e                              1
gumbel       -z - exp(-z), z = e + g   1 - exp(-z)                    exp(-z)
cauchy       -log(1 + e^2)             2 e / (1 + e^2)                2 (1 - e^2) / (1 + e^2)^2
===========  ========================  =============================  ==========================

with independent coordinates, up to constants. g = 0.5772... is Euler's constant: Gumbel noise is *centred*, so
that it has mean zero like the Gaussian. (A shift of all coordinates does not change an argmax over a simplex, but it
would change a shortest path.) Each density gives the logarithm of its ratio; automatic differentiation of it gives the
weights of every order.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from newton_plugin._errors import ArgumentTypeError, check_choice

__all__ = ["Cauchy", "Gaussian", "Gumbel", "Noise", "resolve_noise"]

EULER = 0.5772156649015329


@runtime_checkable
class Noise(Protocol):
    """A density with independent coordinates.

    Attributes:
        symmetric: whether e and -e are equally likely, as antithetic pairs need.
        has_mean: whether the mean exists; it must then be zero.
    """

    symmetric: bool
    has_mean: bool

    def sample(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Fresh noise in the shape, dtype and device of ``like``."""
        ...

    def log_ratio(self, noise: Tensor, shift: Tensor) -> Tensor:
        """``log mu(e - shift) - log mu(e)``, summed over coordinates: (K, N, m), (N, m) -> (K, N)."""
        ...

    def score(self, noise: Tensor) -> Tensor:
        """``-(log mu)'``, for each coordinate.

        A density may have a method ``slope`` as well, the derivative of this; Hessians then come in closed form.
        """
        ...


class Gaussian:
    """Standard normal noise.

    >>> e, shift = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[0.5, 0.0]])
    >>> Gaussian().log_ratio(e, shift).item()  # 1/2 - 0.5^2/2
    0.375
    """

    symmetric = True
    has_mean = True

    def __repr__(self) -> str:
        return "Gaussian()"

    def sample(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        """See :class:`Noise`."""
        return torch.empty_like(like).normal_(generator=generator)

    def log_ratio(self, noise: Tensor, shift: Tensor) -> Tensor:
        """``e . d - |d|^2 / 2``."""
        return torch.einsum("knm,nm->kn", noise, shift) - shift.square().sum(-1) / 2

    def score(self, noise: Tensor) -> Tensor:
        """``e``."""
        return noise

    def slope(self, noise: Tensor) -> Tensor:
        """1, the derivative of the score."""
        return torch.ones_like(noise)


class Gumbel:
    """Gumbel noise with mean zero: under it the expected argmax is a softmax.

    >>> e, shift = torch.tensor([[[-EULER]]]), torch.tensor([[1.0]])
    >>> round(Gumbel().log_ratio(e, shift).item(), 4)  # 1 - (exp(1) - 1)
    -0.7183
    """

    symmetric = False
    has_mean = True

    def __repr__(self) -> str:
        return "Gumbel()"

    def sample(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        """See :class:`Noise`."""
        exponential = torch.empty_like(like).exponential_(generator=generator)
        return -exponential.clamp_min(torch.finfo(like.dtype).tiny).log() - EULER

    def log_ratio(self, noise: Tensor, shift: Tensor) -> Tensor:
        """``sum d - exp(-z) (exp(d) - 1)``."""
        return shift.sum(-1) - torch.einsum("knm,nm->kn", torch.exp(-EULER - noise), torch.expm1(shift))

    def score(self, noise: Tensor) -> Tensor:
        """``1 - exp(-z)``."""
        return -torch.expm1(-EULER - noise)

    def slope(self, noise: Tensor) -> Tensor:
        """``exp(-z)``, the derivative of the score."""
        return torch.exp(-EULER - noise)


class Cauchy:
    """Standard Cauchy noise: it has heavy tails and no mean; its score is bounded by one.

    >>> e, shift = torch.tensor([[[1.0]]]), torch.tensor([[1.0]])
    >>> round(Cauchy().log_ratio(e, shift).item(), 4)  # log 2
    0.6931
    """

    symmetric = True
    has_mean = False

    def __repr__(self) -> str:
        return "Cauchy()"

    def sample(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        """See :class:`Noise`."""
        # Squares must fit into float32; about one of 10^18 samples is larger.
        return torch.empty_like(like).cauchy_(generator=generator).clamp_(-1e18, 1e18)

    def log_ratio(self, noise: Tensor, shift: Tensor) -> Tensor:
        """``-log(1 + d (d - 2 e) / (1 + e^2))``: one logarithm, where the difference of two would cancel."""
        inverse = 1 / (1 + noise.square())
        return -torch.log1p(shift * (shift * inverse - 2 * noise * inverse)).sum(-1)

    def score(self, noise: Tensor) -> Tensor:
        """``2 e / (1 + e^2)``."""
        return 2 * noise / (1 + noise.square())

    def slope(self, noise: Tensor) -> Tensor:
        """``2 (1 - e^2) / (1 + e^2)^2``, the derivative of the score."""
        squared = noise.square()
        return 2 * ((1 - squared) / (1 + squared)) / (1 + squared)


_BY_NAME = {"gaussian": Gaussian, "gumbel": Gumbel, "cauchy": Cauchy}


def resolve_noise(noise: Any) -> Noise:
    """The noise object for a name; instances as they are."""
    if isinstance(noise, str):
        check_choice("noise", noise, tuple(_BY_NAME), "Or pass an object with the methods of Gaussian.")
        return _BY_NAME[noise]()
    if isinstance(noise, type) or not isinstance(noise, Noise):
        raise ArgumentTypeError(
            f"noise must be one of {', '.join(map(repr, _BY_NAME))} or an object with symmetric, has_mean, sample, "
            f"log_ratio and score; got {noise!r}."
        )
    return noise
