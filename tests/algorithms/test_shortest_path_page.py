"""The code on docs/shortest-paths.md runs, and the examples in the docstrings of this family are true."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "shortest-paths.md").read_text()
BLOCKS = dict(re.findall(r"<!-- run: (\w+) -->\n```python\n(.*?)```", PAGE, re.DOTALL))


@pytest.mark.parametrize("name", ["exact", "noise", "graph", "relaxed"])
def test_a_block_of_the_page(name: str) -> None:
    exec(compile(BLOCKS[name], name, "exec"), {})


def test_all_blocks_are_run() -> None:
    assert PAGE.count("```python") == len(BLOCKS) == 4


@pytest.mark.parametrize("name", ["bellman_ford", "grid_path", "graph_path"])
def test_docstrings(name: str) -> None:
    # Classes and functions behind a decorator are found through their module's __all__.
    module = importlib.import_module(f"newton_plugin.algorithms._shortest_paths.{name}")
    failed, attempted = doctest.testmod(module)
    assert attempted > 2
    assert failed == 0
