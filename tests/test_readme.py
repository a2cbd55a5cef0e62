"""The README's code runs, each block by itself, as a reader copies it; and does what the README says."""

from __future__ import annotations

import re

import pytest
from tests.reader import ROOT, surroundings

README = (ROOT / "README.md").read_text()
BLOCKS = dict(re.findall(r"<!-- run: (\w+) -->\n```python\n(.*?)```", README, re.DOTALL))


@pytest.mark.parametrize("name", list(BLOCKS))
def test_readme_block(name: str) -> None:
    names = surroundings()
    exec(BLOCKS[name], names)
    if name in ("loss", "loop"):
        assert names["model"].head.weight.grad is not None
    if name in ("ranking", "paths"):
        assert names["loss"].ndim == 0
    if name == "black_box":
        assert names["costs"].grad is not None
    if name == "convex":
        assert names["p"].grad is not None
    if name == "bilevel":
        assert names["weights"].any()


def test_no_block_is_left_out() -> None:
    assert README.count("```python") == len(BLOCKS) == 9
