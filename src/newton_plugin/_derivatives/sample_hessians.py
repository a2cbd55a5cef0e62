r"""The Hessian of each sample's loss, as whatever is cheapest to have, and what a batch's Hessians add up to.

Any loss that can be differentiated twice gives Hessian-vector products. The samples of a batch do not interact in the
loss, so the Hessian of the whole-batch loss is block diagonal, and *one* product with the probe
``(e_j, e_j, ..., e_j)`` gives column j of every sample's block. m probes give all blocks, through class weights,
``ignore_index`` and unreduced losses alike, with no per-sample loop.

Some losses give more, and then m products a step are a waste: cross-entropy's Hessian is ``a (diag(p) - p p')``, a
squared error's is a multiple of the identity, and the sorting losses have theirs from a few matrix products. A
curvature uses what there is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from newton_plugin._errors import NewtonPluginError
from newton_plugin._linalg.damped_inverse import identity_rows
from newton_plugin._linalg.diagonal_rank_one import DiagonalRankOne
from newton_plugin._linalg.matrices import to_blocks
from newton_plugin._linalg.sketch import random_signs

__all__ = ["HVP", "HessianUnavailable", "SampleHessians"]

HVP = Callable[[Tensor], Tensor]
"""(K, N, m) -> (K, N, m): K probes v for every sample, to ``H_i v_ki``."""

_CHUNK_ELEMENTS = 2**21  # of (K, N, m), probes at once: 16 MiB
# And of what the loss makes of them on the way. About a seventh is alive at the same time. Measured on 16 relaxed
# Bellman-Ford grids of 48 x 48, 6e8 numbers a probe: all 32 probes at once take 15 GB and 80 s, one at a time 2.8 GB
# and 26 s.
_GRAPH_ELEMENTS = 2**27
_GRAPH_ELEMENTS_OF_DEVICES = 2**30  # where a product costs launches
_FEW_ELEMENTS = 2**14  # of (K, N, m), up to which the graph is not measured: measuring costs a tenth of a product


class HessianUnavailable(NewtonPluginError, RuntimeError):
    """Raised by a Hessian-vector product that cannot be computed; its message is the cause."""


@dataclass(frozen=True)
class SampleHessians:
    """Hessian-vector products, and what else the loss can give. An instance is a :data:`HVP`.

    Attributes:
        products: the Hessian-vector products.
        diagonal_rank_one: the whole Hessian in O(N m), if it is of that kind.
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
    def of(hvp: HVP) -> SampleHessians:
        """From any :data:`HVP`: a plain function gives products only."""
        return hvp if isinstance(hvp, SampleHessians) else SampleHessians(hvp)

    @staticmethod
    def of_rank_one(matrices: DiagonalRankOne) -> SampleHessians:
        """From Hessians that are a diagonal minus a rank-one matrix."""
        return SampleHessians(matrices, diagonal_rank_one=matrices, independent=True)

    @staticmethod
    def of_blocks(blocks: Callable[[], Tensor]) -> SampleHessians:
        """From a function that gives every H_i."""

        def products(vectors: Tensor) -> Tensor:
            return torch.einsum("nij,knj->kni", blocks().to(vectors), vectors)

        return SampleHessians(products, blocks=blocks, independent=True)

    @staticmethod
    def joined(parts: Sequence[SampleHessians], rows: Sequence[int]) -> SampleHessians:
        """Those of several sets of samples, which follow one another; they do not depend on one another.

        Args:
            parts: of each set, in closed form.
            rows: its number of samples.
        """
        if len(parts) == 1:
            return parts[0]

        def products(vectors: Tensor) -> Tensor:
            return torch.cat([part(v) for part, v in zip(parts, vectors.split(list(rows), -2), strict=True)], -2)

        rank_one = [part.diagonal_rank_one for part in parts if part.diagonal_rank_one is not None]
        if len(rank_one) == len(parts):
            return SampleHessians.of_rank_one(DiagonalRankOne.joined(rank_one))
        if all(part.known for part in parts):
            blocks = [_blocks_of(part) for part in parts]
            return SampleHessians(products, blocks=lambda: torch.cat([make() for make in blocks]), independent=True)
        return SampleHessians(products, independent=all(part.independent for part in parts))

    def times(self, factor: Tensor | None) -> SampleHessians:
        """The same times a factor without dimensions; None: 1."""
        if factor is None:
            return self
        if self.diagonal_rank_one is not None:
            return SampleHessians.of_rank_one(self.diagonal_rank_one.times(factor))
        blocks = self.blocks
        if blocks is not None:
            return SampleHessians.of_blocks(lambda: blocks() * factor)
        return SampleHessians(
            lambda v: self.products(v) * factor.to(v), independent=self.independent, elements=self.elements
        )

    @property
    def known(self) -> bool:
        """Whether no probe is needed."""
        return self.diagonal_rank_one is not None or self.blocks is not None

    def to(self, gradient: Tensor) -> SampleHessians:
        """The same for rows (N, m): in their dtype, on their device; blocks are formed, once, and made symmetric."""
        if self.diagonal_rank_one is not None:
            return SampleHessians.of_rank_one(self.diagonal_rank_one.to(gradient))
        if self.blocks is None:
            return self
        matrices = self.blocks().to(gradient)
        matrices = (matrices + matrices.mT) / 2
        return SampleHessians.of_blocks(lambda: matrices)

    def dense(self, gradient: Tensor) -> Tensor:
        """Every H_i, (N, m, m)."""
        if self.diagonal_rank_one is not None:
            return self.diagonal_rank_one.dense()
        if self.blocks is not None:
            return self.blocks()
        columns = torch.cat([products for _, products in self._columns(gradient)]).movedim(0, -2)
        return (columns + columns.mT) / 2

    def dense_sum(self, gradient: Tensor, groups: int = 1) -> Tensor:
        """``sum_i H_i``, (m, m); with several groups, one sum for each, (T, m, m)."""
        n, m = gradient.shape
        matrices = self.diagonal_rank_one
        if matrices is not None:
            # sum_i diag(d_i) - a_i p_i p_i', without the (N, m, m) in between.
            total = torch.diag_embed(to_blocks(matrices.diagonal, groups).sum(1))
            if matrices.weight is not None and matrices.vector is not None:
                p = to_blocks(matrices.vector, groups)
                total = total - (to_blocks(matrices.weight.unsqueeze(-1), groups) * p).mT @ p
        elif self.blocks is not None:
            total = self.blocks().reshape(n // groups, groups, m, m).sum(0)
        else:
            sums = [p.reshape(len(p), n // groups, groups, m).sum(1) for _, p in self._columns(gradient)]
            total = torch.cat(sums).movedim(0, -2)
            total = (total + total.mT) / 2
        return total[0] if groups == 1 else total

    def diagonal_sum(self, gradient: Tensor) -> Tensor:
        """The diagonal of ``sum_i H_i``, (m,), by m products where it is not known."""
        if self.diagonal_rank_one is not None:
            return self.diagonal_rank_one.diagonals().sum(0)
        if self.blocks is not None:
            return self.blocks().diagonal(dim1=-2, dim2=-1).sum(0)
        return torch.cat([(products.sum(1) * probes).sum(-1) for probes, products in self._columns(gradient)])

    def estimated_diagonal_sum(self, gradient: Tensor, probes: int) -> Tensor:
        """Hutchinson's estimate of the diagonal of ``sum_i H_i``, (m,): ``E z * (H_i z)`` over random signs z.

        Every sample has signs of its own, so the error goes down with the root of the samples times the probes.
        """
        n, m = gradient.shape
        total = gradient.new_zeros(m)
        for seed in range(probes if n else 0):
            signs = random_signs((1, n, m), gradient, seed)
            total = total + (signs * self.products(signs)).sum((0, 1))
        return total / probes

    def probe_sum(self, gradient: Tensor, probes: Tensor) -> Tensor:
        """``W sum_i H_i``, (r, m), for probes W (r, m)."""
        return torch.cat([products.sum(1) for _, products in self._columns(gradient, probes)])

    def of_one(self, vectors: Tensor) -> Tensor:
        """``H_i v_i``, one vector for each sample: (N, m) -> (N, m)."""
        return self.products(vectors.unsqueeze(0))[0]

    def _columns(self, gradient: Tensor, probes: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Chunks of probes, (K, m), and their products with every sample's Hessian, (K, N, m)."""
        n, m = gradient.shape
        probes = identity_rows(gradient) if probes is None else probes
        for chunk in probes.split(self._at_once(len(probes), gradient)):
            expanded = chunk.unsqueeze(1).expand(-1, n, -1)
            yield chunk, self.products(expanded) if n else gradient.new_zeros(len(chunk), 0, m)

    def _at_once(self, count: int, gradient: Tensor) -> int:
        """How many of so many probes go into one product; at least one."""
        size = max(1, gradient.numel())
        most = _CHUNK_ELEMENTS // size
        if self.elements is not None and count * size > _FEW_ELEMENTS:
            budget = _GRAPH_ELEMENTS if gradient.device.type == "cpu" else _GRAPH_ELEMENTS_OF_DEVICES
            most = min(most, budget // max(1, self.elements()))
        return max(1, most)


def _blocks_of(hessians: SampleHessians) -> Callable[[], Tensor]:
    if hessians.blocks is not None:
        return hessians.blocks
    assert hessians.diagonal_rank_one is not None
    return hessians.diagonal_rank_one.dense
