"""The empirical Fisher of per-sample gradients: ``C = 1/N sum_i g_i g_i'``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from newton_plugin._curvature.batch import Batch
from newton_plugin._curvature.damping import Damping, damping_for, damping_of
from newton_plugin._curvature.finiteness import Finiteness
from newton_plugin._curvature.protocol import (
    HVP,
    STRUCTURES,
    Curvature,
    CurvatureStep,
    Structure,
    check_groups,
    check_power,
    describe,
)
from newton_plugin._curvature.refresh import KeptCurvature, check_refresh_every
from newton_plugin._curvature.running_mean import RunningMean
from newton_plugin._curvature.sizes import mean_is_formed, refuse_beyond
from newton_plugin._curvature.statistics import Statistics
from newton_plugin._derivatives.sample_hessians import SampleHessians
from newton_plugin._errors import check_choice
from newton_plugin._linalg.damped_inverse import push_through, working_dtype
from newton_plugin._linalg.large_rows import are_large, combine, divide, gram, solve_rows, sum_over_rows
from newton_plugin._linalg.matrices import Dense, Diagonal, Isotropic, count_eigenvalues, to_blocks
from newton_plugin._linalg.sketch import sketch_of_rows
from newton_plugin._runtime.processes import ONE_PROCESS, Ranks

__all__ = ["EmpiricalFisher", "batch_fisher"]


def batch_fisher(batch: Batch, ndim: int) -> Tensor:
    """The batch's ``1/N sum_i g_i g_i'``: tr / m of it (ndim 0), its diagonal (1), all of it (2) or by groups (3)."""
    if ndim == 0:
        return batch.ranks.mean(batch.squared_norms().sum(), batch.samples * batch.gradient.shape[1])
    sums = batch.ranks.known or _sums(batch, ndim)
    return batch.in_units(batch.ranks.mean(sums.total, sums.count))


def _sums(batch: Batch, ndim: int) -> Statistics:
    """``sum_i g_i g_i'`` of the rows of this process, and what its mean is divided by."""
    rows = batch.gradient
    if ndim == 3:
        total = sum_over_rows(rows, lambda part: _products(to_blocks(part, batch.groups)), batch.groups)
        return Statistics(total, batch.samples_of_groups)
    return Statistics(sum_over_rows(rows, _products if ndim == 2 else _squares), batch.samples)


def _squares(rows: Tensor) -> Tensor:
    return rows.square().sum(0)


def _products(rows: Tensor) -> Tensor:
    return rows.mT @ rows


class EmpiricalFisher(Curvature):
    """``C = 1/N sum_i g_i g_i'``: needs gradients only, is never indefinite.

    Where the loss is a log-likelihood it estimates the Fisher information. It scales with the *square* of
    the loss, so with power 1 a loss times c gives a step divided by c; an optimizer that normalises (Adam)
    does not notice.

    Args:
        structure: "mean", "per_sample", "isotropic", "diagonal" or "block".
        power: 1, or 0.5 for ``(C + d I)^-1/2 g``.
        refresh_every: steps for which C and its factorisation are used; 1: C is new at every step.

    With structure "mean" and N < m, C is not formed above 128 features: the step goes through an N x N system in
    O(N m) memory, and is the same step. Where the damping averages C over batches ("auto"), C is formed up to 256
    features; above that (and N < m) it is the batch's own C, rescaled to the running mean of its scale.

    Raises:
        OutputsTooLargeError: at a step whose dense blocks would take more than 2 GiB.
    """

    def __init__(self, structure: Structure = "mean", power: float = 1, refresh_every: int = 1) -> None:
        check_choice("structure", structure, STRUCTURES)
        self.structure: Structure = structure
        self.power = check_power(power)
        self.refresh_every = check_refresh_every(refresh_every, structure)
        self._mean = RunningMean(nonnegative=True)
        self._kept = KeptCurvature(self.refresh_every, self.power)

    def __repr__(self) -> str:
        return describe(self)

    def streams(self, gradient: Tensor) -> bool:
        """See :meth:`Curvature.streams`. A subclass with a ``step`` of its own gets the gradients converted."""
        return are_large(gradient) and self.takes_weight

    def step(
        self,
        gradient: Tensor,
        hvp: HVP | None,
        damping: Damping,
        ranks: Ranks = ONE_PROCESS,
        groups: int = 1,
        weight: Tensor | None = None,
        live: Tensor | None = None,
        factor: Tensor | None = None,
    ) -> CurvatureStep:
        """See :meth:`Curvature.step`; ``hvp`` is not used."""
        n, m = gradient.shape
        groups = groups if self.structure == "block" else 1
        check_groups(n, groups)
        # A step is linear in the rows, so only the sums of squares have to know their weight.
        batch = Batch(gradient, damping, ranks, groups, None if weight is None else weight.square(), live, factor)
        if self.structure == "per_sample":
            return self._per_sample(batch)
        if self.structure == "isotropic":
            return self._isotropic(batch)
        refreshed = not self._kept.serves(m, groups)
        if refreshed:
            if not self._is_formed(batch):
                return self._push_through(batch)
            self._refresh(batch)
        return self._from_kept(batch, refreshed)

    @property
    def one_number(self) -> bool:
        """See :attr:`Curvature.one_number`."""
        return self.structure in ("isotropic", "per_sample") and self.refresh_every == 1

    def statistics(
        self, gradient: Tensor, damping: Damping, ranks: Ranks, groups: int = 1, live: Tensor | None = None
    ) -> Statistics | None:
        """See :meth:`Curvature.statistics`: ``sum_i |g_i|^2``, or what is kept of ``sum_i g_i g_i'``."""
        m = gradient.shape[1]
        batch = Batch(gradient, damping, ranks, groups if self.structure == "block" else 1, live=live)
        kept = self._kept.serves(m, batch.groups)
        if self.structure in ("isotropic", "per_sample"):
            if kept:
                return None
            squared, total = batch.squares()
            return Statistics(total, batch.samples * max(1, m), squared)
        check_groups(len(gradient), batch.groups)
        if kept or not self._is_formed(batch):
            return None
        return _sums(batch, self._ndim(batch))

    def _is_formed(self, batch: Batch) -> bool:
        """Whether C, or what is kept of it, is formed; see ``mean_is_formed``."""
        one_matrix = self.structure == "mean" or (self.structure == "block" and batch.groups == 1)
        n, m = batch.gradient.shape
        return not one_matrix or mean_is_formed(n, m, batch.damping, batch.ranks)

    def _ndim(self, batch: Batch) -> int:
        """The dimensions of what is kept of C, in :func:`batch_fisher`; refuses blocks that are too large."""
        m, groups = batch.gradient.shape[1], batch.groups
        if groups > 1:
            asked = f"curvature='fisher' with structure='block', {groups} blocks of {m} features each,"
            refuse_beyond(groups * m * m, asked, "a C", "Use structure='mean' or 'diagonal' (O(N m) memory).")
        return 1 if self.structure == "diagonal" else 2 if groups == 1 else 3

    def _refresh(self, batch: Batch) -> None:
        """Form C, average it, and keep it with its damping."""
        m, groups, ndim = batch.gradient.shape[1], batch.groups, self._ndim(batch)
        c = batch.averaged(self._mean, batch_fisher(batch, ndim))
        matrix = (Diagonal if ndim == 1 else Dense)(c, definite=True)
        norm = self._mean.norm  # the next step's bound on growth needs it too
        scale = (lambda: norm() / count_eigenvalues(c) ** 0.5) if batch.averages else matrix.scale
        d = damping_for(batch.damping, scale, batch.gradient, finite=batch.averages)
        self._kept.put(matrix, d, self._mean.finite, m, groups)

    def _from_kept(self, batch: Batch, refreshed: bool) -> CurvatureStep:
        inverse, matrix, d = self._kept.use(batch.gradient.device)
        own = batch.own if self.power == 1 else 0.0
        if refreshed and not own and not are_large(batch.gradient):
            step = witness = inverse(batch.gradient)  # C covers the gradients: only the steps are left to check
        else:
            step, witness = solve_rows(inverse, batch.gradient, own, batch.unit, batch.groups, batch.factor)
        # A kept C was agreed at an earlier step; the gradients of this batch have not been compared across ranks.
        finiteness = Finiteness(self._kept.finite, agreed=refreshed, witness=witness)
        return CurvatureStep(step, d, matrix.matrix, matrix.extremes, finiteness=finiteness)

    def _isotropic(self, batch: Batch) -> CurvatureStep:
        # (c I + own g g' + d I)^-1 g = g / (c + d + own |g|^2), so the |g_i|^2 are all that is needed.
        gradient, damping, kept = batch.gradient, batch.damping, self._kept
        m = gradient.shape[1]
        squared, total = batch.squares()
        refreshed = not kept.serves(m, 1)
        if refreshed:
            c = batch.averaged(self._mean, batch.ranks.mean(total, batch.samples * m))
            d = damping_for(damping, lambda: c, gradient, finite=batch.averages)
            kept.put(Isotropic(c), d, self._mean.finite, m)
        matrix, d = kept.use_matrix(gradient.device)
        assert isinstance(matrix, Isotropic)
        shifted = matrix.value + d if self.power == 1 else (matrix.value + d).sqrt()
        own = batch.own if self.power == 1 else 0.0
        # The own term keeps a step finite where its gradient is. But a C of an earlier step says nothing about the
        # gradients of this batch.
        covers = refreshed and batch.ranks.covers
        bounded = covers and own > 0 and damping.bounded
        witness = None if bounded else total / shifted
        by = torch.add(shifted, squared, alpha=own) if own else shifted
        return CurvatureStep(
            divide(gradient, by, batch.factor),
            d,
            matrix.matrix,
            matrix.extremes,
            finiteness=Finiteness(kept.finite, covers, witness, bounded),
            # Of large rows neither gradients nor steps are kept for somebody who might ask.
            sizes=(lambda: (total, (squared / by / by).sum())) if are_large(gradient) else None,
        )

    def _per_sample(self, batch: Batch) -> CurvatureStep:
        # g is an eigenvector of g g' with eigenvalue |g|^2, so (g g' + d I)^-p g = (|g|^2 + d)^-p g.
        squared, total = batch.squares()
        covers = batch.ranks.covers
        bounded = covers and batch.damping.bounded
        d = damping_of(batch.damping, self._running_size(batch, total)[0])
        by = squared + d if self.power == 1 else (squared + d).sqrt()
        rank_deficient = batch.gradient.shape[1] > 1
        return CurvatureStep(
            divide(batch.gradient, by, batch.factor),
            d,
            None,
            lambda: (torch.zeros_like(d) if rank_deficient else squared.min(), squared.max()),
            finiteness=Finiteness(self._mean.finite, covers, None if bounded else squared / by, bounded),
            sizes=lambda: (squared.sum(), (squared / by / by).sum()),
        )

    def _running_size(self, batch: Batch, total: Tensor) -> tuple[Tensor, Tensor]:
        """tr(C) / m, averaged over batches, and of this batch alone, from the sum of the ``|g_i|^2``."""
        size = batch.ranks.mean(total, batch.samples * max(1, batch.gradient.shape[1]))
        return batch.averaged(self._mean, size), size

    def _push_through(self, batch: Batch) -> CurvatureStep:
        # An m x m running mean would cost more than the rest of the step. The batch's C is rescaled to the running
        # size instead. The rows of all ranks have one dtype, however large each rank's part is.
        gradient = batch.gradient.to(working_dtype(batch.gradient.device)) if batch.ranks.many else batch.gradient
        rows, here = batch.ranks.rows(gradient)  # and which of them are of this process
        m = rows.shape[1]
        products = batch.in_units(gram(rows))
        live = batch.live
        if live is not None and batch.ranks.many:
            live = (products.diagonal() != 0).sum()  # rows that have a gradient, NaN included
        whole = replace(batch, gradient=rows, ranks=ONE_PROCESS, live=live)
        # Every rank has the rows of all ranks, so the mean needs no further collective.
        running_size, size = self._running_size(whole, products.diagonal().sum())
        weight = torch.where(size > 0, running_size / size, 1.0) / whole.samples
        finite = self._mean.finite
        assert finite is not None
        c = torch.where(finite, products, 0.0) * weight
        # G'G and GG' share their eigenvalues.
        d = damping_for(batch.damping, lambda: torch.linalg.matrix_norm(c) / m**0.5, rows)
        if self.refresh_every > 1:
            # C = weight / unit * rows' rows, by its own factorisation.
            self._kept.put(sketch_of_rows(rows.to(c.dtype), c, batch.in_units(weight)), d, finite, m)
            return self._from_kept(batch, True)
        solved = push_through(c, d, self.power)[here]
        inner = (solved * products[here]).sum(-1, keepdim=True)
        own = batch.own if self.power == 1 else 0.0
        if own:
            solved = solved / torch.rsub(inner, 1.0, alpha=-own)
        return CurvatureStep(
            combine(solved if batch.factor is None else solved * batch.factor, rows, products),
            d,
            None,
            lambda: (torch.zeros_like(d), torch.linalg.eigvalsh(c).max()),
            finiteness=Finiteness(finite, agreed=True, witness=inner),
            sizes=lambda: (products.diagonal()[here].sum(), ((solved @ products) * solved).sum()),
        )

    def initial_state(
        self, gradient: Tensor, damping: Damping, groups: int = 1, hessians: SampleHessians | None = None
    ) -> dict[str, Any]:
        """See :meth:`Curvature.initial_state`."""
        if not damping.averaging.decay:
            return {}
        n, m = gradient.shape
        groups = groups if self.structure == "block" else 1
        shape: tuple[int, ...] = ()
        if self.structure == "diagonal":
            shape = (m,)
        elif groups > 1:
            shape = (groups, m, m)
        elif self.structure in ("mean", "block") and mean_is_formed(n, m, damping, ONE_PROCESS):
            shape = (m, m)
        return RunningMean.initial_state(shape, gradient)

    def state_dict(self) -> dict[str, Any]:
        """The running mean of C, and the C that is kept for the next steps."""
        kept = self._kept.state_dict()
        return self._mean.state_dict() | ({"kept": kept} if kept else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self._mean.load_state_dict(state)
        self._kept.load_state_dict(state.get("kept", {}))
