"""The examples in the docstrings of this room run and say the truth."""

from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = (
    "_log_domain",
    "_ranking.ranking_loss",
    "_ranking.relevance",
    "_ranking.soft_rank",
    "_ranking.top_k",
    "_sorting.neural_sort",
    "_sorting.soft_sort",
    "_sorting_network.layers",
    "_sorting_network.network",
    "_sorting_network.swaps",
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    module = importlib.import_module(f"newton_plugin.algorithms.{name}")
    failed, attempted = doctest.testmod(module)
    assert attempted > 0
    assert failed == 0
