"""Differentiable algorithms whose losses are stable in float32 and twice differentiable.

Sorting: a soft permutation matrix ``P`` (rows are ranks, smallest first) by NeuralSort, SoftSort or a sorting
network, and from it ranking losses, soft ranks, top-k, NDCG, average precision.

Paths: ``shortest_path`` and ``shortest_path_graph``, exact; ``relaxed_bellman_ford``, a soft path.

Black boxes: ``StochasticSmoothing`` of any function, ``PerturbedOptimizer`` and ``FenchelYoungLoss`` for solvers of
linear problems (paths, assignments, rankings), by noise on their inputs.
"""

from newton_plugin.algorithms._black_box.fenchel_young import FenchelYoungLoss
from newton_plugin.algorithms._black_box.perturbed import PerturbedOptimizer
from newton_plugin.algorithms._black_box.smoothing import StochasticSmoothing
from newton_plugin.algorithms._ranking.ranking_loss import RankingLoss
from newton_plugin.algorithms._ranking.relevance import average_precision_loss, ndcg_loss
from newton_plugin.algorithms._ranking.soft_rank import soft_rank, spearman_loss
from newton_plugin.algorithms._ranking.top_k import soft_top_k
from newton_plugin.algorithms._shortest_paths.bellman_ford import relaxed_bellman_ford
from newton_plugin.algorithms._shortest_paths.cheapest import ShortestPath
from newton_plugin.algorithms._shortest_paths.graph_path import shortest_path_graph
from newton_plugin.algorithms._shortest_paths.grid_path import shortest_path
from newton_plugin.algorithms._sorting.neural_sort import neural_sort
from newton_plugin.algorithms._sorting.soft_sort import soft_sort
from newton_plugin.algorithms._sorting_network.network import SortingNetwork

__all__ = [
    "FenchelYoungLoss",
    "PerturbedOptimizer",
    "RankingLoss",
    "ShortestPath",
    "SortingNetwork",
    "StochasticSmoothing",
    "average_precision_loss",
    "ndcg_loss",
    "neural_sort",
    "relaxed_bellman_ford",
    "shortest_path",
    "shortest_path_graph",
    "soft_rank",
    "soft_sort",
    "soft_top_k",
    "spearman_loss",
]
