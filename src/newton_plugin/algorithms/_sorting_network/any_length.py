"""The sorting network of whatever length the lists have."""

from __future__ import annotations

import torch
from torch import Tensor

from newton_plugin.algorithms._list_loss.chunks import InChunks
from newton_plugin.algorithms._list_loss.scores import check_scores
from newton_plugin.algorithms._sorting_network.network import SortingNetwork

__all__ = ["AnyLengthNetwork"]


class AnyLengthNetwork:
    """A sorting network for lists of any length: one :class:`SortingNetwork` for each length and device, kept."""

    def __init__(self, layout: str = "odd_even", swap: str = "logistic", steepness: float = 10.0) -> None:
        self._arguments = (layout, swap, steepness)
        self._networks: dict[tuple[int, torch.device], SortingNetwork] = {}
        SortingNetwork(1, *self._arguments)  # a wrong argument fails here, not at the first batch

    def __repr__(self) -> str:
        layout, swap, steepness = self._arguments
        return f"SortingNetwork(layout={layout!r}, swap={swap!r}, steepness={steepness})"

    def of(self, scores: Tensor) -> SortingNetwork:
        """The network for lists of this length, on this device."""
        check_scores(scores)
        key = (scores.shape[-1], scores.device)
        if key not in self._networks:
            self._networks[key] = SortingNetwork(key[0], *self._arguments).to(scores.device)
        return self._networks[key]

    def __call__(self, scores: Tensor) -> Tensor:
        """P: scores (..., n) -> (..., n, n)."""
        return self.of(scores)(scores)[1]

    def rows(self, scores: Tensor, k: int, lengths: Tensor | None = None) -> Tensor:
        """The first k rows of P."""
        return self.of(scores).rows(scores, k, lengths)

    def ranks(self, scores: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Soft ranks, without P."""
        return self.of(scores).ranks(scores, lengths)

    def ranking(self, scores: Tensor, target: Tensor, lengths: Tensor | None = None) -> InChunks:
        """The ranking loss of lists (N, n), n >= 2, with its derivatives: see ``RankingLoss``."""
        return self.of(scores).ranking(scores, target, lengths)

    def log_probabilities(self, scores: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(log P, log(1 - P))``."""
        return self.of(scores).log_probabilities(scores, lengths)
