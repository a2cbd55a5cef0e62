"""The examples in the docstrings of this room run and say the truth."""

from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = ("layers", "log_domain", "neural_sort", "ranking_loss", "relevance", "soft_rank", "soft_sort")


@pytest.mark.parametrize("name", [*MODULES, "sorting_network", "swaps", "top_k"])
def test_examples(name: str) -> None:
    module = importlib.import_module(f"newton_plugin.algorithms._{name}")
    failed, attempted = doctest.testmod(module)
    assert attempted > 0
    assert failed == 0
