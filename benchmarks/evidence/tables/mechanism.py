"""The table of signal and noise; :mod:`benchmarks.evidence.training.mechanism` measures them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from benchmarks.evidence.problems.problem import Problem
from benchmarks.evidence.tables.markdown import lines

__all__ = ["mechanism_table"]

_RULES = ("soft normalisation", "whitened (C + d)^-1/2", "Fisher (C + d)^-1")


def mechanism_table(path: Path, every: Mapping[str, Problem]) -> str:
    """Markdown; of equal measurements the last counts."""
    rows = {(r["problem"], r["share"]): r for r in map(json.loads, path.read_text().splitlines())}
    cells = [
        [
            every[name].title,
            f"{100 * share:.0f} %",
            f"{r['spread']:.1f}",
            f"{100 * r['tail']:.0f} %",
            f"{r['signal_largest']:.2f} / {r['signal_smallest']:.2f}",
            f"{r['plain']:.3f}",
            *(f"{r[rule] / r['plain']:.2f}" if r["plain"] > 0.005 else f"({r[rule]:.3f})" for rule in _RULES),
        ]
        for (name, share), r in rows.items()
        if name in every
    ]
    header = ["problem", "trained", "spread", "tail", "signal, large / small", "plain", *_RULES]
    text = (
        "Made by `python -m benchmarks.evidence tables` from evidence/mechanism.jsonl; what is measured, and how: "
        "benchmarks/evidence/training/mechanism.py. One seed, plain training. *spread*: largest eigenvalue of C over "
        "the mean. *tail*: share of the squared gradients that a tenth of the samples holds. *signal*: share of signal "
        "along the eigenvectors with the largest and smallest third of the eigenvalues (1 where the loss does not "
        "sample). *plain*: signal-to-noise of the parameters' gradient of a batch; the other columns are times that, "
        "at the same weights (in brackets the ratio itself, where plain's is below .005)."
    )
    return "\n\n".join(["# Why: signal and noise", text, lines(header, cells)]) + "\n"
