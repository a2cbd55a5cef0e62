"""Gaussian noise for many replicas at once: each draws from a generator of its own, as it would alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["ReplicaNoise"]


class ReplicaNoise:
    """Standard normal noise for problems (K, R * N, ...); replicas with equal seeds draw equal noise.

    Args:
        seeds: of the R replicas.
    """

    symmetric = True
    has_mean = True

    def __init__(self, seeds: Sequence[int]) -> None:
        self._seeds = list(seeds)
        self._generators = {seed: torch.Generator().manual_seed(seed) for seed in seeds}

    def sample(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Noise in the shape of ``like``; ``generator`` is not used."""
        k, n = like.shape[0], like.shape[1] // len(self._seeds)
        drawn = {
            seed: torch.randn(k, n, *like.shape[2:], dtype=like.dtype, generator=own)
            for seed, own in self._generators.items()
        }
        return torch.cat([drawn[seed] for seed in self._seeds], 1).to(like.device)

    def log_ratio(self, noise: Tensor, shift: Tensor) -> Tensor:
        """``e . d - |d|^2 / 2``: (K, N, m), (N, m) -> (K, N)."""
        return torch.einsum("knm,nm->kn", noise, shift) - shift.square().sum(-1) / 2

    def score(self, noise: Tensor) -> Tensor:
        """``-(log density)'``."""
        return noise
