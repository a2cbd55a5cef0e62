"""The README's code runs as written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = dict(re.findall(r"<!-- run: (\w+) -->\n```python\n(.*?)```", README, re.DOTALL))


class Batches:
    """Two batches, as from a DataLoader."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Any:
        return iter([self.tensors] * 2)


def surroundings() -> dict[str, Any]:
    """What the reader has already: a model, data, a loss."""
    import pytorch_lightning as pl

    import newton_plugin as npl

    class Model(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x)

        def training_step(self, batch: Any) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    torch.manual_seed(0)
    x, target = torch.randn(6, 4), torch.arange(6) % 3

    def trainer(**kwargs: Any) -> pl.Trainer:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        return pl.Trainer(fast_dev_run=2, accelerator="cpu", enable_model_summary=False, **quiet, **kwargs)

    return {
        "torch": torch,
        "npl": npl,
        "Trainer": trainer,
        "model": Model(),
        "data": Batches(x, target),
        "x": x,
        "target": target,
        "loss_fn": torch.nn.functional.cross_entropy,
        "scores": torch.randn(5, 4, requires_grad=True),
        "ranks": torch.rand(5, 4).argsort(-1),
        "x_clean": torch.randn(6, 4),
        "target_clean": target,
    }


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


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
