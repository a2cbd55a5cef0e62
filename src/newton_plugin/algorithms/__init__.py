"""Differentiable algorithms whose losses are stable in float32 and twice differentiable."""

from newton_plugin.algorithms._neural_sort import neural_sort
from newton_plugin.algorithms._ranking_loss import RankingLoss

__all__ = ["RankingLoss", "neural_sort"]
