"""What a reader of the README and of docs/ has already when a block of code begins: data, a model, a loss, a Trainer.

A page that needs more says so in a comment, which nobody sees on the page:

    <!-- given
    observed = torch.eye(3).expand(6, 3, 3)
    -->
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
_PARTS = re.compile(r"<!-- given\n(.*?)-->|^```python\n(.*?)^```\n(?:\n?```text\n(.*?)^```)?", re.DOTALL | re.MULTILINE)


def parts(page: Path) -> list[tuple[int, str, str | None]]:
    """Line, text, and what it prints (a ```text block right below it) of every piece of Python on a page, in order."""
    text = page.read_text()
    return [(text[: m.start()].count("\n") + 2, m[1] or m[2] or "", m[3]) for m in _PARTS.finditer(text)]


def masked(text: str) -> str:
    """Printed numbers count to two decimals, errors of rounding (powers of ten) not at all."""
    return re.sub(r"(\d\.\d\d)\d+", r"\1", re.sub(r"\d+e[-+]\d+", "#", text)).strip()


class Batches:
    """Two batches, as from a DataLoader."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Any:
        return iter([self.tensors] * 2)


def surroundings() -> dict[str, Any]:
    """Names and what they stand for, made anew."""
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
        short = {"fast_dev_run": 2, "accelerator": "cpu", "enable_model_summary": False}
        return pl.Trainer(**{**kwargs, **quiet, **short})

    return {
        "torch": torch,
        "npl": npl,
        "pl": pl,
        "Trainer": trainer,
        "model": Model(),
        "Batches": Batches,
        "data": Batches(x, target),
        "x": x,
        "target": target,
        "loss_fn": torch.nn.functional.cross_entropy,
        "scores": torch.randn(5, 4, requires_grad=True),
        "ranks": torch.rand(5, 4).argsort(-1),
        "mask": torch.ones(5, 4, dtype=torch.bool),
        "x_clean": torch.randn(6, 4),
        "target_clean": target,
    }
