"""Differentiable algorithms whose losses are stable in float32 and twice differentiable.

Sorting: a soft permutation matrix ``P`` (rows are ranks, smallest first) by NeuralSort, SoftSort or a sorting
network, and what is made of it: ranking losses, soft ranks, top-k, NDCG, average precision.
"""

from newton_plugin.algorithms._neural_sort import neural_sort
from newton_plugin.algorithms._ranking_loss import RankingLoss
from newton_plugin.algorithms._relevance import average_precision_loss, ndcg_loss
from newton_plugin.algorithms._soft_rank import soft_rank, spearman_loss
from newton_plugin.algorithms._soft_sort import soft_sort
from newton_plugin.algorithms._sorting_network import SortingNetwork
from newton_plugin.algorithms._top_k import soft_top_k

__all__ = [
    "RankingLoss",
    "SortingNetwork",
    "average_precision_loss",
    "ndcg_loss",
    "neural_sort",
    "soft_rank",
    "soft_sort",
    "soft_top_k",
    "spearman_loss",
]
