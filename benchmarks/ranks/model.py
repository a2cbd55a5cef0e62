"""What the collectives of a step take on 8 to 4,096 ranks, from latency and bandwidth: a model, and not measured.

One all-reduce of n bytes over R ranks takes, with latency a and bandwidth b,

* as a ring: ``2 (R - 1) a + 2 (R - 1)/R n / b``;
* as a tree: ``2 ceil(log2 R) a + 2 n / b``.

A gather of n bytes of each rank: ``(R - 1) (a + n / b)`` as a ring, and ``ceil(log2 R) a + (R - 1) n / b`` as a tree.
"""

from __future__ import annotations

import math
from typing import Any

__all__ = ["LINKS", "RANKS", "STEP", "rows"]

RANKS = (8, 32, 128, 512, 1024, 4096)
STEP = 100.0  # ms, of which a hundredth is the goal
LINKS = {"InfiniBand, 5 us, 25 GB/s": (5e-6, 25e9), "Ethernet, 30 us, 1.25 GB/s": (30e-6, 1.25e9)}
# The collectives of a step in bytes, the first between the hosts where it decides what follows.
STEPS: dict[str, list[int]] = {
    "before: default, two of 16 bytes": [16, 16],
    "default, one of 1 kB": [1024],
    "default, 3 layers: one more of 48 bytes": [1024, 48],
    "mean, m = 100: 16 bytes and 80 kB": [16, 8 * (100**2 + 1)],
    "mean, m = 500: 16 bytes and 2 MB": [16, 8 * (500**2 + 1)],
    "hessian, m = 100": [1024, 8 * (100**2 + 1), 4],
}


def seconds(sent: list[int], ranks: int, latency: float, bandwidth: float, kind: str) -> float:
    """Of all-reduces, one after the other."""
    if kind == "ring":
        return sum(2 * (ranks - 1) * latency + 2 * (ranks - 1) / ranks * n / bandwidth for n in sent)
    return sum(2 * math.ceil(math.log2(ranks)) * latency + 2 * n / bandwidth for n in sent)


def rows() -> list[dict[str, Any]]:
    """Milliseconds by rule, link, kind of collective and number of ranks."""
    return [
        {"step": name, "link": link, "as a": kind} | {f"{r:,}": 1e3 * seconds(sent, r, *numbers, kind) for r in RANKS}
        for name, sent in STEPS.items()
        for link, numbers in LINKS.items()
        for kind in ("tree", "ring")
    ]
