r"""A diagonal minus a rank-one matrix for each sample: the Hessian of cross-entropy, and its damped inverse in O(m).

One sample's Hessian ``H = diag(d) - a p p'`` is inverted by the formula of Sherman and Morrison. With E = d + damping,

    (diag(E) - a p p')^-1 g = E^-1 g + E^-1 p (a p' E^-1 g) / (1 - a p' E^-1 p).

If all E > 0, the matrix is positive definite exactly where the denominator is positive. A sample whose matrix is not
positive definite is repaired by the absolute values of its eigenvalues, as everywhere: densely where the matrices are
small, in Krylov spaces elsewhere. No loss of PyTorch with non-negative class weights needs that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from newton_plugin._linalg.damped_inverse import shifted_eigenvalues, spectral_inverse
from newton_plugin._linalg.krylov import KrylovOptions, add_product, lockstep_power
from newton_plugin._linalg.sketch import random_signs
from newton_plugin._runtime.transforms import readable

__all__ = ["REPAIR_FEATURES", "DiagonalRankOne"]

REPAIR_FEATURES = 1024  # up to here a repair may form its matrix: 8 MiB in float64
_REPAIR_ELEMENTS = 2**25  # of the matrices of all samples that are repaired, 256 MiB
_CACHE_ELEMENTS = 2**15  # of the rows that are worked on at once on a CPU, 256 KiB: three times as fast


@dataclass(frozen=True)
class DiagonalRankOne:
    """``H_i = diag(d_i) - a_i p_i p_i'``.

    Attributes:
        diagonal: d, (N, m); or expandable to it, as long as nothing but products and :meth:`to` is asked for.
        weight: a, (N,); None if there is no second term.
        vector: p, (N, m); None if there is no second term.
    """

    diagonal: Tensor
    weight: Tensor | None = None
    vector: Tensor | None = None

    def __call__(self, vectors: Tensor) -> Tensor:
        """``H_i v_ki``, (K, N, m) -> (K, N, m)."""
        product = self.diagonal * vectors
        if self.weight is None or self.vector is None:
            return product
        inner = (self.vector * vectors).sum(-1, keepdim=True)
        return product - self.weight.unsqueeze(-1) * self.vector * inner

    def to(self, rows: Tensor) -> DiagonalRankOne:
        """The same for rows (N, m): in their dtype, on their device, with one diagonal for each row."""
        diagonal = self.diagonal.to(rows).expand(rows.shape)
        if self.weight is None or self.vector is None:
            return DiagonalRankOne(diagonal)
        return DiagonalRankOne(diagonal, self.weight.to(rows), self.vector.to(rows))

    def times(self, factor: Tensor) -> DiagonalRankOne:
        """The same times a factor without dimensions."""
        factor = factor.to(self.diagonal.dtype)
        return DiagonalRankOne(
            self.diagonal * factor, None if self.weight is None else self.weight * factor, self.vector
        )

    @staticmethod
    def joined(parts: Sequence[DiagonalRankOne]) -> DiagonalRankOne:
        """The matrices of several sets of samples, one set after another; all diagonals are (N_k, m)."""
        diagonal = torch.cat([part.diagonal for part in parts])
        if all(part.weight is None for part in parts):
            return DiagonalRankOne(diagonal)
        terms = [part.second_term() for part in parts]
        return DiagonalRankOne(diagonal, torch.cat([a for a, _ in terms]), torch.cat([p for _, p in terms]))

    def second_term(self) -> tuple[Tensor, Tensor]:
        """a, (N,), and p, (N, m); zeros if there is no second term."""
        if self.weight is None or self.vector is None:
            return self.diagonal.new_zeros(len(self.diagonal)), torch.zeros_like(self.diagonal)
        return self.weight, self.vector

    def dense(self) -> Tensor:
        """All H_i, (N, m, m)."""
        matrices = torch.diag_embed(self.diagonal)
        if self.weight is None or self.vector is None:
            return matrices
        return matrices - (self.weight.unsqueeze(-1) * self.vector).unsqueeze(-1) * self.vector.unsqueeze(-2)

    def diagonals(self) -> Tensor:
        """The diagonals of all H_i, (N, m)."""
        if self.weight is None or self.vector is None:
            return self.diagonal
        return self.diagonal - self.weight.unsqueeze(-1) * self.vector.square()

    def squared_norms(self) -> Tensor:
        """``||H_i||_F^2``, (N,)."""
        return torch.cat([part._squared_norms() for part, _ in self._parts(self.diagonal)])

    def _squared_norms(self) -> Tensor:
        if self.weight is None or self.vector is None:
            return torch.linalg.vecdot(self.diagonal, self.diagonal)
        own = self.vector.square()
        diagonal = self.diagonal - self.weight.unsqueeze(-1) * own
        # What (a p p')^2 has beside its own diagonal.
        beside = (own.sum(-1).square() - torch.linalg.vecdot(own, own)).clamp_min(0)
        return torch.linalg.vecdot(diagonal, diagonal) + self.weight.square() * beside

    def inverse_times(self, gradient: Tensor, damping: Tensor, power: float) -> Tensor:
        """``(H_i + d I)^-power g_i`` for every sample: (N, m) -> (N, m); d has no dimensions."""
        return torch.cat([part._inverse_times(rows, damping, power) for part, rows in self._parts(gradient)])

    def _inverse_times(self, gradient: Tensor, damping: Tensor, power: float) -> Tensor:
        if self.weight is None or self.vector is None:
            return gradient * shifted_eigenvalues(self.diagonal, damping).pow(-power)
        if power != 1:
            return self._repaired(gradient, damping, power)
        solved, positive, denominator = self._by_formula(gradient, damping)
        indefinite = (denominator <= 0) | ~positive
        if not readable(indefinite):
            return self._unseen(gradient, damping, solved, denominator)
        if bool(indefinite.any()):  # waits for the device, as every repair does
            part = DiagonalRankOne(self.diagonal[indefinite], self.weight[indefinite], self.vector[indefinite])
            solved[indefinite] = part._repaired(gradient[indefinite], damping, power)
        return solved

    def _by_formula(self, gradient: Tensor, damping: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(H_i + d I)^-1 g_i`` by Sherman and Morrison, whether all E are positive, and the denominators, (N,)."""
        assert self.weight is not None
        assert self.vector is not None
        shifted = self.diagonal + damping
        scaled = self.vector / shifted
        denominator = 1 - self.weight * torch.linalg.vecdot(scaled, self.vector)
        solved = gradient / shifted
        inner = self.weight * torch.linalg.vecdot(solved, self.vector) / denominator
        solved = add_product(solved, inner.unsqueeze(-1), scaled)
        return solved, shifted.amin(-1) > 0, denominator

    def _unseen(self, gradient: Tensor, damping: Tensor, solved: Tensor, denominator: Tensor) -> Tensor:
        """The repair where Python cannot see which matrices need it, and to decompose all of them would be too dear.

        H + d I has the determinant of E times the denominator, and ``-a p p'`` lifts one eigenvalue at most. So with
        a < 0 it is positive definite, too, where one E is negative and the denominator as well. Where it is not, a
        negative class weight has made H negative semi-definite, and ``|H|`` is -H. What else is not definite gives a
        NaN, and the step is not taken.
        """
        assert self.weight is not None
        below = (self.diagonal + damping <= 0).sum(-1)
        lowered = self.weight < 0
        definite = torch.where(below == 0, denominator > 0, (below == 1) & lowered & (denominator < 0))
        other, positive, unlike = DiagonalRankOne(-self.diagonal, -self.weight, self.vector)._by_formula(
            gradient, damping
        )
        known = lowered & (self.diagonal <= 0).all(-1) & positive & (unlike > 0)
        other = other.masked_fill(~known.unsqueeze(-1), torch.nan)
        return torch.where(definite.unsqueeze(-1), solved, other)

    def _repaired(self, gradient: Tensor, damping: Tensor, power: float) -> Tensor:
        n, m = gradient.shape
        if m <= REPAIR_FEATURES and n * m * m <= _REPAIR_ELEMENTS:
            matrices = self.dense()
            finite = torch.isfinite(matrices).all(-1, keepdim=True).all(-2, keepdim=True)
            solved = spectral_inverse(torch.where(finite, matrices, 0.0), damping, power)(gradient)
            return torch.where(finite.squeeze(-1), solved, torch.nan)
        options = KrylovOptions(tolerance=1e-10, most=64)
        return lockstep_power(self._of_one, gradient, damping, power, options).step

    def extremes(self, damping: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest eigenvalue of any H_i: exact for a diagonal, else as far as 48 products show.

        Args:
            damping: decides how many of the products are needed.
        """
        if self.weight is None:
            return self.diagonal.min(), self.diagonal.max()
        start = random_signs(tuple(self.diagonal.shape), self.diagonal)
        return lockstep_power(self._of_one, start, damping, 1.0, KrylovOptions(1e-10, 48)).extremes

    def _of_one(self, vectors: Tensor) -> Tensor:
        """``H_i v_i``, (N, m) -> (N, m)."""
        return self(vectors.unsqueeze(0))[0]

    def _parts(self, gradient: Tensor) -> Iterator[tuple[DiagonalRankOne, Tensor]]:
        """A few samples at a time on a CPU, so that intermediate results stay in its cache."""
        n, m = gradient.shape
        size = max(1, _CACHE_ELEMENTS // max(1, m)) if gradient.device.type == "cpu" else max(1, n)
        for first in range(0, max(1, n), size):
            at = slice(first, first + size)
            weight = None if self.weight is None else self.weight[at]
            vector = None if self.vector is None else self.vector[at]
            yield DiagonalRankOne(self.diagonal[at], weight, vector), gradient[at]
