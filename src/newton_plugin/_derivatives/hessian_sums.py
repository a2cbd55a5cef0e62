"""What a batch's Hessians add up to: all of them, their sum, its blocks, its diagonal or its trace.

The samples of a batch do not interact in the loss, so the Hessian of the whole-batch loss is block diagonal
and *one* product with the probe ``(e_j, e_j, ..., e_j)`` gives column j of every sample's block. m probes
give all blocks, through class weights, ``ignore_index`` and unreduced losses alike, with no per-sample loop. Where a
loss knows more (:class:`newton_plugin._derivatives.sample_hessians.SampleHessians`), no probe is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from newton_plugin._derivatives.sample_hessians import HVP
from newton_plugin._linalg.damped_inverse import identity_rows
from newton_plugin._linalg.diagonal_rank_one import DiagonalRankOne, dense_samples, sample_diagonals
from newton_plugin._linalg.matrices import to_blocks
from newton_plugin._linalg.sketch import random_signs

__all__ = ["DirectForms", "dense_sum", "diagonal_sum", "probe_sum", "sample_hessians", "trace_sum"]

_CHUNK_ELEMENTS = 2**21  # of (K, N, m), probes taken at once: 16 MiB
# And of what the loss makes of them. About a seventh is alive at the same time. Measured on 16 relaxed Bellman-Ford
# grids of 48 x 48, 6e8 numbers a probe: all 32 probes at once take 15 GB and 80 s, one at a time 2.8 GB and 26 s.
_GRAPH_ELEMENTS = 2**27
_GRAPH_ELEMENTS_OF_DEVICES = 2**30  # where a product costs launches
_FEW_ELEMENTS = 2**14  # of (K, N, m), up to which the graph is not looked at: that takes a tenth of a product
_EXACT_DIAGONAL = 256  # features up to which a diagonal is had from m probes; above, estimated from a few
_DIAGONAL_PROBES = 8


@dataclass(frozen=True)
class DirectForms:
    """Hessian-vector products, and what else the loss can give; None where it cannot."""

    products: HVP
    diagonal_rank_one: DiagonalRankOne | None
    blocks: Tensor | None
    n: int
    m: int
    elements: Callable[[], int] | None = None

    @staticmethod
    def of(hvp: HVP, gradient: Tensor) -> DirectForms:
        """Read off ``hvp``, in the dtype of the gradient. Any function will do; a plain one gives products only."""
        form, blocks = getattr(hvp, "diagonal_rank_one", None), getattr(hvp, "blocks", None)
        n, m = gradient.shape
        if form is not None:
            form = DiagonalRankOne(
                form.diagonal.to(gradient), *(_to(part, gradient) for part in (form.weight, form.vector))
            )
            return DirectForms(form, form, None, n, m)
        if blocks is None:
            return DirectForms(hvp, None, None, n, m, getattr(hvp, "elements", None))
        matrices = blocks().to(gradient)
        matrices = (matrices + matrices.mT) / 2
        return DirectForms(lambda v: torch.einsum("nij,knj->kni", matrices, v), None, matrices, n, m)

    @property
    def known(self) -> bool:
        """Whether no probe is needed."""
        return self.diagonal_rank_one is not None or self.blocks is not None

    def samples(self) -> Tensor | None:
        """All H_i, (N, m, m), if they are known."""
        if self.diagonal_rank_one is not None:
            return dense_samples(self.diagonal_rank_one, self.n, self.m)
        return self.blocks

    def diagonals(self) -> Tensor | None:
        """The diagonals of all H_i, (N, m), if they are known."""
        if self.diagonal_rank_one is not None:
            return sample_diagonals(self.diagonal_rank_one, self.n, self.m)
        return None if self.blocks is None else self.blocks.diagonal(dim1=-2, dim2=-1)


def sample_hessians(forms: DirectForms, gradient: Tensor) -> Tensor:
    """Every H_i, (N, m, m)."""
    known = forms.samples()
    if known is not None:
        return known
    columns = torch.cat([products for _, products in _columns(forms, gradient)]).movedim(0, -2)
    return (columns + columns.mT) / 2


def dense_sum(forms: DirectForms, gradient: Tensor, groups: int) -> Tensor:
    """``sum_i H_i``, (m, m); with several groups, one sum for each, (T, m, m)."""
    n, m = gradient.shape
    form = forms.diagonal_rank_one
    if form is not None:
        # sum_i diag(d_i) - a_i p_i p_i', without the (N, m, m) in between.
        total = torch.diag_embed(to_blocks(form.diagonal.expand(n, m), groups).sum(1))
        if form.weight is not None and form.vector is not None:
            p = to_blocks(form.vector, groups)
            total = total - (to_blocks(form.weight.unsqueeze(-1), groups) * p).mT @ p
        return total[0] if groups == 1 else total
    if forms.blocks is not None:
        total = forms.blocks.reshape(n // groups, groups, m, m).sum(0)
    else:
        sums = [p.reshape(len(p), n // groups, groups, m).sum(1) for _, p in _columns(forms, gradient)]
        total = torch.cat(sums).movedim(0, -2)
        total = (total + total.mT) / 2
    return total[0] if groups == 1 else total


def diagonal_sum(forms: DirectForms, gradient: Tensor) -> Tensor:
    """The diagonal of ``sum_i H_i``, (m,).

    Exact where it is known or m probes are few. Above that Hutchinson's estimate, ``E z * (H_i z)`` over random signs
    z, other ones for each sample: what is wrong with it goes down with the root of the samples times the probes.
    """
    known = forms.diagonals()
    if known is not None:
        return known.sum(0)
    n, m = gradient.shape
    if m <= _EXACT_DIAGONAL:
        return torch.cat([(p.sum(1) * chunk).sum(-1) for chunk, p in _columns(forms, gradient)])
    total = gradient.new_zeros(m)
    for seed in range(_DIAGONAL_PROBES if n else 0):
        signs = random_signs((1, n, m), gradient, seed)
        total = total + (signs * forms.products(signs)).sum((0, 1))
    return total / _DIAGONAL_PROBES


def trace_sum(forms: DirectForms, gradient: Tensor) -> Tensor:
    """The trace of ``sum_i H_i``; no dimensions. Estimated where :func:`diagonal_sum` is."""
    return diagonal_sum(forms, gradient).sum()


def probe_sum(forms: DirectForms, gradient: Tensor, probes: Tensor) -> Tensor:
    """``W sum_i H_i``, (r, m), for probes W (r, m)."""
    return torch.cat([products.sum(1) for _, products in _columns(forms, gradient, probes)])


def _columns(forms: DirectForms, gradient: Tensor, probes: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of probes, (K, m), and their products with every sample's Hessian, (K, N, m)."""
    n, m = gradient.shape
    probes = identity_rows(gradient) if probes is None else probes
    for chunk in probes.split(_at_once(forms, len(probes), gradient)):
        expanded = chunk.unsqueeze(1).expand(-1, n, -1)
        yield chunk, forms.products(expanded) if n else gradient.new_zeros(len(chunk), 0, m)


def _at_once(forms: DirectForms, count: int, gradient: Tensor) -> int:
    """How many of so many probes to take at once; at least one."""
    size = max(1, gradient.numel())
    most = _CHUNK_ELEMENTS // size
    if forms.elements is not None and count * size > _FEW_ELEMENTS:
        budget = _GRAPH_ELEMENTS if gradient.device.type == "cpu" else _GRAPH_ELEMENTS_OF_DEVICES
        most = min(most, budget // max(1, forms.elements()))
    return max(1, most)


def _to(part: Any, like: Tensor) -> Any:
    return None if part is None else part.to(like)
