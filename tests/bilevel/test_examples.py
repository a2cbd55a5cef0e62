"""The code in docstrings, in docs/bilevel.md and in examples/ runs."""

from __future__ import annotations

import doctest
import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from examples import bilevel_lightning, noisy_rankings

DOCS = (Path(__file__).parents[2] / "docs" / "bilevel.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)


@pytest.mark.parametrize(
    "name",
    [
        "_hypergradient.hypergradient",
        "_methods.accbo",
        "_methods.masoba",
        "_methods.borep",
        "_methods.stocbio",
    ],
)
def test_docstrings(name: str) -> None:
    failed, attempted = doctest.testmod(importlib.import_module(f"newton_plugin.bilevel.{name}"))
    assert attempted > 0
    assert failed == 0


def test_the_first_and_the_last_block_of_the_page() -> None:
    torch.manual_seed(0)
    batches = [
        (torch.arange(i, i + 20), torch.randn(20, 64), torch.randint(10, (20,)), torch.randn(9, 64), torch.arange(9))
        for i in (0, 20)
    ]
    names: dict[str, Any] = {"batches": batches}
    exec(BLOCKS[0], names)
    assert float(names["logits"].detach().norm()) > 0
    exec(BLOCKS[-1], names)
    assert names["h"].shape == (1000,)


def test_the_surrogate_of_the_page_can_be_differentiated_twice() -> None:
    import newton_plugin as npl
    from newton_plugin.algorithms import RankingLoss

    names: dict[str, Any] = {"npl": npl, "ranking_loss": RankingLoss("neural_sort", temperature=1.0)}
    names |= {"scores": torch.randn(4, 5, requires_grad=True), "ranks": torch.rand(4, 5).argsort(-1)}
    exec(next(block for block in BLOCKS if block.startswith("target =")), names)
    assert names["losses"].shape == (4,)
    (first,) = torch.autograd.grad(names["losses"].sum(), names["scores"], create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), names["scores"])
    torch.testing.assert_close(second, torch.ones(4, 5))


def _run(module: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    threads = torch.get_num_threads()
    try:
        module.main()
    finally:
        torch.set_num_threads(threads)


def test_noisy_rankings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _run(noisy_rankings, monkeypatch, "--steps", "10")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert re.fullmatch(r"Newton Losses, learned weights +\d+\.\d %   0\.\d{3}", lines[-1])


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*smaller than the logging interval")
def test_bilevel_lightning(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _run(bilevel_lightning, monkeypatch, "--epochs", "2")
    assert re.search(r"AUROC 0\.\d{3}; test accuracy \d\d\.\d %", capsys.readouterr().out)
