"""One C for the batch, ``C = 1/N sum_i H_i`` or a part of it: formed, of low rank, or sketched.

=================================  =====================================================================
the Hessians are                   C
=================================  =====================================================================
a diagonal                         dense up to 128 features, else a diagonal
a diagonal minus rank one          Woodbury's formula where C would not be formed; see ``mean_is_formed``
blocks that are known              dense up to 1,024 features, else a sketch by 32 products
products                           dense up to 256 features, else a sketch by 32 products
=================================  =====================================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from newton_plugin._curvature.batch import Batch
from newton_plugin._curvature.damping import Damping
from newton_plugin._curvature.fisher import batch_fisher
from newton_plugin._curvature.protocol import Structure
from newton_plugin._curvature.running_mean import RunningMean
from newton_plugin._curvature.sizes import (
    DENSE_FEATURES,
    DIAGONAL_PROBES,
    EXACT_DIAGONAL_FEATURES,
    FORMED_FROM_BLOCKS,
    FORMED_FROM_PRODUCTS,
    mean_is_formed,
)
from newton_plugin._derivatives.sample_hessians import SampleHessians
from newton_plugin._errors import ArgumentError
from newton_plugin._linalg.diagonal_low_rank import DiagonalLowRank
from newton_plugin._linalg.diagonal_rank_one import DiagonalRankOne
from newton_plugin._linalg.matrices import Dense, Diagonal, Isotropic, SymmetricMatrix
from newton_plugin._linalg.sketch import RANK, probes_for, sketch
from newton_plugin._runtime.processes import ONE_PROCESS, Ranks
from newton_plugin._runtime.transforms import readable

__all__ = ["Knowledge", "MeanHessian", "mean_hessian", "running_shape", "summed_hessians"]


class Knowledge(IntEnum):
    """What a rank knows of the Hessians of its samples, best first. The ranks act by the worst."""

    DIAGONAL = 0
    RANK_ONE = 1
    BLOCKS = 2
    PRODUCTS = 3
    NOTHING = 4
    REFUSED = 5

    @staticmethod
    def of(hessians: SampleHessians, m: int) -> Knowledge:
        """What ``hessians`` of outputs with m features bring."""
        rank_one = hessians.diagonal_rank_one
        if rank_one is None:
            return Knowledge.PRODUCTS if hessians.blocks is None else Knowledge.BLOCKS
        if rank_one.weight is None:
            return Knowledge.DIAGONAL
        # Woodbury's formula needs the square roots of the weights. Where it could be used, a step waits for the device
        # anyway, so the signs are checked only there. Unseen, a negative weight gives a NaN, and no step is taken.
        if m > DENSE_FEATURES and readable(rank_one.weight) and bool((rank_one.weight < 0).any()):
            return Knowledge.BLOCKS
        return Knowledge.RANK_ONE


@dataclass(frozen=True)
class MeanHessian:
    """The running mean of C.

    Attributes:
        matrix: C; None where the batch's Hessian is zero and a sketch was due: the caller takes Fisher's step.
        finite: whether this batch's C is finite; no dimensions.
        zero: whether this batch's Hessian is zero; no dimensions. Its Fisher then takes its place.
    """

    matrix: SymmetricMatrix | None
    finite: Tensor | None
    zero: Tensor


def summed_hessians(structure: Structure, hessians: SampleHessians, gradient: Tensor, groups: int) -> Tensor:
    """What C needs of the Hessians, added over the samples of this process.

    Returns:
        ``tr / m`` without dimensions, the diagonal (m,), W C (r, m) for the probes W of a sketch, C (m, m), or one for
        each group (T, m, m).
    """
    m = gradient.shape[1]
    if structure in ("isotropic", "diagonal"):
        diagonal = _diagonal(hessians, gradient)
        return diagonal.sum() / m if structure == "isotropic" else diagonal
    if structure == "mean" and m > FORMED_FROM_PRODUCTS and not hessians.known:
        return hessians.probe_sum(gradient, probes_for(gradient))
    return hessians.dense_sum(gradient, groups)


def _diagonal(hessians: SampleHessians, gradient: Tensor) -> Tensor:
    if hessians.known or gradient.shape[1] <= EXACT_DIAGONAL_FEATURES:
        return hessians.diagonal_sum(gradient)
    return hessians.estimated_diagonal_sum(gradient, DIAGONAL_PROBES)


def mean_hessian(
    structure: Structure,
    worst: Knowledge,
    hessians: SampleHessians,
    summed: Tensor | None,
    batch: Batch,
    mean: RunningMean,
) -> MeanHessian:
    """C of this batch in its running mean, as cheaply as all ranks can have it.

    Args:
        structure: any but "per_sample".
        worst: what the rank that knows least knows.
        hessians: of the samples of this process.
        summed: what :func:`summed_hessians` gave, if it has been computed.
        batch: the gradients.
        mean: the running mean.
    """
    gradient = batch.gradient
    n, m = gradient.shape
    form = _form(structure, worst, n, m, batch.damping, batch.ranks)
    if form == "low_rank":
        assert hessians.diagonal_rank_one is not None
        return _low_rank(hessians.diagonal_rank_one, batch, mean)
    if form == "only_diagonal":
        return _averaged(hessians.diagonal_sum(gradient), Diagonal, batch, mean)
    if form == "sketch":
        return _sketched(hessians, summed, batch, mean)
    if summed is None:
        summed = summed_hessians(structure, hessians, gradient, batch.groups)
    kind = {"isotropic": Isotropic, "diagonal": Diagonal}.get(structure, Dense)
    return _averaged(summed, kind, batch, mean)


def _form(structure: Structure, worst: Knowledge, n: int, m: int, damping: Damping, ranks: Ranks) -> str:
    """How C is had: "low_rank", "only_diagonal", "sketch", or "summed" as :func:`summed_hessians` gives it."""
    if structure == "mean":
        if worst == Knowledge.RANK_ONE and not mean_is_formed(n, m, damping, ranks):
            return "low_rank"
        if worst == Knowledge.DIAGONAL and m > DENSE_FEATURES:
            return "only_diagonal"
        if m > {Knowledge.BLOCKS: FORMED_FROM_BLOCKS, Knowledge.PRODUCTS: FORMED_FROM_PRODUCTS}.get(worst, m):
            return "sketch"
    return "summed"


def running_shape(
    structure: Structure, gradient: Tensor, damping: Damping, groups: int, hessians: SampleHessians | None
) -> tuple[int, ...]:
    """The shape of what :func:`mean_hessian` averages over batches.

    Raises:
        ArgumentError: it depends on what is known of the Hessians, and nobody says.
    """
    n, m = gradient.shape
    if structure in ("isotropic", "per_sample"):
        return ()
    if structure == "diagonal":
        return (m,)
    if groups > 1:
        return (groups, m, m)
    if structure == "mean" and m > DENSE_FEATURES:
        if hessians is None:
            raise ArgumentError(
                f"init(outputs): with curvature='hessian', structure='mean' and {m} features the form of C depends on "
                "the loss. Pass its other arguments as well, init(outputs, *args)."
            )
        form = _form(structure, Knowledge.of(hessians, m), n, m, damping, ONE_PROCESS)
        return {"low_rank": (), "only_diagonal": (m,), "sketch": (2 * RANK, m)}.get(form, (m, m))
    return (m, m)


def _averaged(summed: Tensor, kind: type, batch: Batch, mean: RunningMean) -> MeanHessian:
    """The running mean of the batches' means. A zero Hessian is replaced by the batch's Fisher."""
    m = batch.gradient.shape[1]
    c = batch.ranks.mean(summed, batch.samples_of_groups)
    zero = (c == 0).all()
    # One process with a small C forms the Fisher in any case and does not wait for the device. Several ranks wait and
    # look first: the Fisher is another all-reduce. So do large C, whose Fisher is work.
    look = readable(zero) and (batch.ranks.many or (c.ndim > 1 and m > DENSE_FEATURES))
    if not (look and not bool(zero)):
        c = torch.where(zero, batch_fisher(batch, c.ndim), c)
    return MeanHessian(kind(batch.averaged(mean, c)), mean.finite, zero)


def _sketched(hessians: SampleHessians, summed: Tensor | None, batch: Batch, mean: RunningMean) -> MeanHessian:
    """The sketch of the running mean of C, which is the running mean of W C."""
    probes = probes_for(batch.gradient)
    summed = hessians.probe_sum(batch.gradient, probes) if summed is None else summed
    products = batch.ranks.mean(summed, batch.samples)
    zero = (products == 0).all()
    if not readable(zero):  # nobody can turn to Fisher's step: its C is sketched like the Hessian's
        fisher = (probes @ batch.gradient.mT) @ batch.gradient / batch.samples
        products = torch.where(zero, fisher, products)
    elif bool(zero):
        return MeanHessian(None, None, zero)
    return MeanHessian(sketch(probes, batch.averaged(mean, products)), mean.finite, zero)


def _low_rank(rank_one: DiagonalRankOne, batch: Batch, mean: RunningMean) -> MeanHessian:
    """``diag(mean d) - P' W P``, rescaled to the running mean of its scale as in ``EmpiricalFisher._push_through``."""
    ranks = batch.ranks
    weight, vector = rank_one.second_term()
    diagonal = ranks.mean(rank_one.diagonal.sum(0), batch.samples)
    rows, _ = ranks.rows(vector)
    weight = ranks.rows(weight.unsqueeze(-1))[0].squeeze(-1) if ranks.many else weight
    norms = weight.abs() * torch.linalg.vecdot(rows, rows)
    finite = torch.isfinite(diagonal).all() & torch.isfinite(norms).all()
    zero = (diagonal == 0).all() & (norms == 0).all()
    factor = diagonal.new_full((), -1.0)
    if not readable(zero):
        rows, weight = torch.where(zero, batch.gradient, rows), torch.where(zero, 1.0, weight)
        factor = torch.where(zero, -factor, factor)
    elif bool(zero):  # the batch's Fisher takes its place
        rows, weight, factor = ranks.rows(batch.gradient)[0], torch.ones_like(weight), -factor
    samples = len(rows) if batch.live is None else ranks.sum(batch.live)
    c = DiagonalLowRank(diagonal, rows, (weight / samples).sqrt(), factor)
    if not batch.averages:
        return MeanHessian(c, finite, zero)
    own = c.scale()
    ratio = torch.where(own > 0, batch.averaged(mean, own) / own, 1.0)
    return MeanHessian(DiagonalLowRank(diagonal * ratio, rows, c.roots, factor * ratio), finite, zero)
