"""Every loss of the example, plain and under NewtonLosses, on generated maps: perfect matches on test maps."""

from __future__ import annotations

import json
import logging
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from examples.shortest_path import TerrainCosts
from examples.terrain_data import TerrainData

from newton_plugin_lightning import NewtonLosses

LOSSES = ("for_l1", "for_l2", "while_l1", "while_l2", "smoothing", "fenchel_young")
ARMS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "norm": {"curvature": "norm"},
    "fisher": {"curvature": "fisher", "damping": "auto", "structure": "mean"},
    "fisher isotropic": {"curvature": "fisher", "damping": "auto", "structure": "isotropic"},
}
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def train(loss: str, newton: dict[str, Any] | None, seed: int, steps: int, data: TerrainData) -> dict[str, float]:
    """One training at the example's settings; what it scores on the test maps."""
    pl.seed_everything(seed, verbose=False)
    data.generator.manual_seed(seed)
    model = TerrainCosts(loss, steps=steps)  # pyright: ignore
    callbacks = [] if newton is None else [NewtonLosses(**newton)]
    trainer = pl.Trainer(max_steps=steps, limit_val_batches=0, callbacks=callbacks, **QUIET)
    start = time.perf_counter()
    trainer.fit(model, data)
    seconds = time.perf_counter() - start
    scores = pl.Trainer(**QUIET).test(model, data, verbose=False)[0]
    return {"perfect_%": 100 * scores["test/perfect"], "cost_ratio": scores["test/cost_ratio"], "seconds": seconds}


def compare_training(seeds: int, steps: int, out: Path) -> None:
    """Appends one line per training to shortest_path_training.jsonl; a training that has its line is not repeated."""
    warnings.simplefilter("ignore")
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    path = out / "shortest_path_training.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    data = TerrainData()
    for seed in range(seeds):
        for loss in LOSSES:
            for arm, newton in ARMS.items():
                key = {"loss": loss, "arm": arm, "seed": seed, "steps": steps}
                if any(key.items() <= row.items() for row in rows):
                    continue
                rows.append(key | train(loss, newton, seed, steps, data))
                print(rows[-1], flush=True)
                with path.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    (out / "shortest_path_training.md").write_text(table(rows, steps) + "\n")


def table(rows: list[dict[str, Any]], steps: int) -> str:
    """Mean and standard deviation of the perfect matches, and the paired difference to plain, over the seeds."""
    lines = ["| loss | " + " | ".join(ARMS) + " |", "|---|" + "---|" * len(ARMS)]
    for loss in LOSSES:
        cells, plain = [], {}
        for arm in ARMS:
            runs = {r["seed"]: r["perfect_%"] for r in rows if (r["loss"], r["arm"], r["steps"]) == (loss, arm, steps)}
            plain = runs if arm == "plain" else plain
            if not runs:
                cells.append("")
                continue
            spread = f" ± {statistics.stdev(runs.values()):.1f}" if len(runs) > 1 else ""
            cell = f"{statistics.mean(runs.values()):.1f}{spread} [{len(runs)}]"
            both = runs.keys() & plain.keys()
            if arm != "plain" and both:
                cell += f" ({statistics.mean(runs[s] - plain[s] for s in both):+.1f})"
            cells.append(cell)
        lines.append(f"| {loss} | " + " | ".join(cells) + " |")
    lines.append("")
    lines.append(
        f"Perfect matches on 500 test maps, %, {steps} steps: mean ± standard deviation [number of seeds], and in"
    )
    lines.append("round brackets the mean paired difference to plain. Settings: those of examples/shortest_path.py,")
    lines.append("chosen on plain training (learning rate 1e-2, not 3e-3; validation maps, one seed, all losses).")
    return "\n".join(lines)
