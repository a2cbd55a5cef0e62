r"""The Hessian of each sample's loss, as whatever is cheapest to have.

Any loss that can be differentiated twice gives Hessian-vector products. Some losses give more, and then m products a
step are a waste: cross-entropy's Hessian is ``a (diag(p) - p p')``, a squared error's a multiple of the identity, and
the sorting losses have theirs from a few matrix products. A curvature takes what there is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from newton_plugin._errors import NewtonPluginError
from newton_plugin._linalg.diagonal_rank_one import DiagonalRankOne

__all__ = ["HVP", "DiagonalRankOne", "SampleHessians"]

HVP = Callable[[Tensor], Tensor]
"""(K, N, m) -> (K, N, m): K probes v for every sample, to ``H_i v_ki``."""


@dataclass(frozen=True)
class SampleHessians:
    """A :data:`HVP` that may know more than products.

    Attributes:
        products: the Hessian-vector products.
        diagonal_rank_one: the whole Hessian in O(N m), if it has that form.
        blocks: gives all H_i, (N, m, m), at less than m products; None if nothing does.
        independent: whether it is known that no sample's loss depends on another's outputs.
        elements: gives how many numbers one vector's products make on their way; None where they make few.
    """

    products: HVP
    diagonal_rank_one: DiagonalRankOne | None = None
    blocks: Callable[[], Tensor] | None = None
    independent: bool = False
    elements: Callable[[], int] | None = None

    def __call__(self, vectors: Tensor) -> Tensor:
        return self.products(vectors)

    @staticmethod
    def of_form(form: DiagonalRankOne) -> SampleHessians:
        """From a closed form."""
        return SampleHessians(form, diagonal_rank_one=form, independent=True)

    @staticmethod
    def of_blocks(blocks: Callable[[], Tensor]) -> SampleHessians:
        """From a function that gives every H_i."""

        def products(vectors: Tensor) -> Tensor:
            return torch.einsum("nij,knj->kni", blocks().to(vectors), vectors)

        return SampleHessians(products, blocks=blocks, independent=True)


class HessianUnavailable(NewtonPluginError, RuntimeError):
    """Raised by a Hessian-vector product that cannot be computed; its message is the cause."""
