"""Is one batch's step to be taken? Only if its C, its gradients and its steps are finite, on every rank."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from newton_plugin._linalg.large_rows import inner_products
from newton_plugin._runtime.processes import Ranks

__all__ = ["Finiteness"]


@dataclass
class Finiteness:
    """What a curvature knows about the finiteness of one batch. The less it says, the more is computed.

    Attributes:
        curvature: whether this batch's C is finite; a tensor without dimensions. Where it is not, the gradient stays as
            it is. None: not checked.
        agreed: whether ``curvature`` is the same on all ranks and covers the gradients of all ranks, so that they need
            not compare again. A sum of squares over the ranks does: one NaN among the gradients makes it NaN.
        witness: numbers at hand that are finite only if all gradients and all steps of this process are: the products
            ``g_i' step_i`` or multiples of them, one a sample; the steps themselves; or one number without dimensions,
            not negative. Gradients that ``curvature`` covers need not be in it. None: computed from the rows.
        bounded: whether all gradients and steps are finite wherever C is, by the algebra of this curvature and its
            damping.
        taken: the verdict: whether the step is taken, and not the gradient. :meth:`judge` sets it.
    """

    curvature: Tensor | None = None
    agreed: bool = False
    witness: Tensor | None = None
    bounded: bool = False
    taken: Tensor | None = None

    def judge(self, gradient: Tensor, step: Tensor, ranks: Ranks) -> Tensor:
        """Whether the step is taken, the same on all ranks; a tensor without dimensions. Does not wait for the device.

        Args:
            gradient: the rows (N, m).
            step: their steps, (N, m).
            ranks: the processes that share the batch.
        """
        taken = self._on_this_rank(gradient, step)
        self.taken = taken if self.agreed else ranks.all(taken)
        return self.taken

    def _on_this_rank(self, gradient: Tensor, step: Tensor) -> Tensor:
        """Whether C and all gradients and steps of this process are finite."""
        if self.bounded and self.curvature is not None:
            return self.curvature
        witness = inner_products(gradient, step) if self.witness is None else self.witness
        finite = (torch.linalg.vector_norm(witness) if witness.ndim else witness) < math.inf
        return finite if self.curvature is None else finite & self.curvature
