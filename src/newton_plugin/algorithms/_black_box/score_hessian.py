r"""The Hessian of a smoothed loss and of a Fenchel-Young loss, in closed form: what double backward gives, at once.

With the samples that the loss has drawn (s the score of the noise, s' its derivative, A the samples minus their
baseline), for each problem::

    smoothed loss       H = mean_k A_k (s_k s_k' - diag(s'_k)) / sigma^2        A_k a number
    Fenchel-Young       H = sym mean_k A_k s_k' / sigma                         A_k a solution

Both are a symmetrised sum of K outer products, minus a diagonal. One matrix product over the samples gives all entries,
in O(N m^2) memory beside the O(K N m) of the samples themselves. The Hessian's product with a vector takes O(K N m) and
forms no matrix. The m Hessian-vector products of double backward cost as many passes over the samples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from newton_plugin import with_hessian
from newton_plugin.algorithms._black_box.black_box import BlackBox, features
from newton_plugin.algorithms._log_domain import wide

__all__ = ["ScoreHessian", "bring_hessian"]


class ScoreHessian:
    """The Hessian of each problem from its samples, computed when it is called.

    Args:
        box: with a noise that knows the slope of its score.
        noise: (K, N, ...).
        advantages: A, (K, N, m) of a Fenchel-Young loss or (K, N, 1) of a smoothed one.
        smoothed: whether it is the smoothed loss.
        weight: of each problem's loss in the loss that is differentiated: 1/N for a mean.
    """

    def __init__(self, box: BlackBox, noise: Tensor, advantages: Tensor, smoothed: bool, weight: float = 1.0) -> None:
        self._box, self._noise, self._advantages = box, noise, advantages
        self._smoothed, self._weight = smoothed, weight

    def _terms(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The two factors of the outer products, (K, N, m) each, and the diagonal (N, m) that is subtracted."""
        e = features(self._noise, 2)
        e = wide(e) if dtype is None else e.to(dtype)
        score: Tensor = self._box.density.score(e)
        left = self._advantages.to(e.dtype) * (self._weight / (self._box.samples * self._box.sigma))
        if not self._smoothed:
            return left, score, None
        left = left / self._box.sigma
        slope: Tensor = self._box.density.slope(e)  # type: ignore[attr-defined]
        return left * score, score, (left * slope).sum(0)

    def __call__(self) -> Tensor:
        """(N, m, m), exactly symmetric."""
        left, right, diagonal = self._terms()
        hessian = left.permute(1, 2, 0) @ right.movedim(1, 0)
        hessian = (hessian + hessian.mT) / 2
        if diagonal is not None:
            hessian.diagonal(dim1=-2, dim2=-1).sub_(diagonal)
        return hessian

    def products(self, vectors: Tensor) -> Tensor:
        """``H_n v_rn``: (R, N, m) -> (R, N, m), without the matrices."""
        left, right, diagonal = self._terms(vectors.dtype)
        result = _outer(left, right, vectors)
        if not self._smoothed:
            result = (result + _outer(right, left, vectors)) / 2
        return result if diagonal is None else result - diagonal * vectors


def _outer(left: Tensor, right: Tensor, vectors: Tensor) -> Tensor:
    """``sum_k left_kn <right_kn, v_rn>``."""
    along = vectors.movedim(1, 0) @ right.permute(1, 2, 0)  # (N, R, K)
    return (along @ left.movedim(1, 0)).movedim(0, 1)


def bring_hessian(loss: Tensor, y: Tensor, hessian: ScoreHessian, box: BlackBox) -> Tensor:
    """Attach the Hessian in the problems y to ``loss``, where that is possible, and return ``loss``."""
    if not (torch.is_grad_enabled() and y.requires_grad) or not hasattr(box.density, "slope"):
        return loss
    functorch: Any = getattr(torch._C, "_functorch")  # noqa: B009 - no type stubs for it
    if functorch.peek_interpreter_stack() is not None:
        return loss  # inside a torch.func transform, which differentiates by itself and whose tensors do not outlive it
    return with_hessian(loss, y, hessian, products=hessian.products)
