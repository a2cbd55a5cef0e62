"""How often the ranks talk at one step, and how much they say: counted where torch.distributed is called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["RULES", "Heads", "count", "counted"]

BATCH = 64  # samples of a rank
RULES: dict[str, dict[str, Any]] = {
    "fisher, isotropic (default)": {},
    "fisher, per_sample": {"structure": "per_sample"},
    "norm": {"curvature": "norm"},
    "fisher, diagonal": {"structure": "diagonal"},
    "fisher, mean": {"structure": "mean"},
    "fisher, mean, fixed damping": {"structure": "mean", "damping": 0.1},
    "hessian, isotropic": {"curvature": "hessian", "structure": "isotropic"},
    "hessian, diagonal": {"curvature": "hessian", "structure": "diagonal"},
    "hessian, mean": {"curvature": "hessian", "structure": "mean"},
    "hessian, per_sample": {"curvature": "hessian", "structure": "per_sample"},
    "auto": {"curvature": "auto"},
}
_NAMES = ("all_reduce", "all_gather", "all_gather_object", "broadcast")


class Heads(nn.Module):
    """So many layers that end at the loss."""

    def __init__(self, heads: int, m: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(64, 512), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(512, m) for _ in range(heads))

    def forward(self, x: Tensor) -> list[Tensor]:
        h = self.trunk(x)
        return [head(h) for head in self.heads]

    @staticmethod
    def loss(outputs: list[Tensor], t: Tensor) -> Tensor:
        return torch.stack([nn.functional.cross_entropy(y, t) for y in outputs]).sum()


@contextmanager
def counted() -> Iterator[list[int]]:
    """The bytes of every collective inside, one entry each."""
    calls: list[int] = []
    before = {name: getattr(dist, name) for name in _NAMES}

    def wrap(collective: Any) -> Any:
        def call(first: Any, *args: Any, **kwargs: Any) -> Any:
            tensors = [first] if isinstance(first, Tensor) else [t for t in first if isinstance(t, Tensor)]
            calls.append(sum(t.numel() * t.element_size() for t in tensors))
            return collective(first, *args, **kwargs)

        return call

    for name, collective in before.items():
        setattr(dist, name, wrap(collective))
    try:
        yield calls
    finally:
        for name, collective in before.items():
            setattr(dist, name, collective)


def count(packages: dict[str, ModuleType]) -> list[dict[str, Any]]:
    """For every rule the collectives and bytes of the second step, with one and with three layers at the loss."""
    rows = []
    for name, options in RULES.items():
        for heads, m in ((1, 10), (1, 100), (1, 2000), (3, 10)):
            if m == 2000 and name not in ("fisher, isotropic (default)", "fisher, mean"):
                continue
            row: dict[str, Any] = {"rule": name, "layers": heads, "m": m}
            for version, package in packages.items():
                torch.manual_seed(dist.get_rank())
                model, hook = Heads(heads, m), package.LossHook(**options)
                x, t = torch.randn(BATCH, 64), torch.randint(0, m, (BATCH,))
                hook(model.loss(model(x), t)).backward()
                with counted() as calls:
                    hook(model.loss(model(x), t)).backward()
                row |= {f"{version} collectives": len(calls), f"{version} bytes": sum(calls)}
            rows.append(row)
    return rows
