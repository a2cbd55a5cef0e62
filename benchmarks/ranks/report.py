"""The page that is made of the rows."""

from __future__ import annotations

import math
import os
import statistics
from typing import Any

from benchmarks.ranks import demo, model
from benchmarks.ranks.counts import BATCH
from benchmarks.tables import markdown
from scipy import stats

__all__ = ["page"]


def page(results: dict[str, Any]) -> str:
    """All tables of results/ranks.md."""
    parts = [
        "# What averaging the curvature over ranks costs",
        f"`python -m benchmarks.ranks --before PATH`, torch {results['torch']}, gloo. *Before* is the version that "
        "took an all-reduce to agree, one for each layer, and one for each gain.",
        "## Collectives and bytes of a step",
        f"Counted at the second step on two ranks, batches of {BATCH} a rank. Bytes are those of the tensors that one "
        "rank passes to all collectives of the step. The first has a fixed size, whatever travels in it: 1,024 bytes, "
        "or 16 where it carries nothing.",
        markdown([_counts(row) for row in results["counts"]]),
        "## Milliseconds",
        f"One machine of {os.cpu_count()} cores, one thread a rank, so 4 ranks share the cores. Batches of {BATCH} a "
        "rank, network 64-512-m; a step is forward, hook, and backward with DDP's own all-reduce. The arms take turns, "
        "step by step. The machine was busy with other work (load 11): the fastest tenth of the steps says most, "
        "beside it the median, and differences of a millisecond say nothing. *Costs*: what a step takes beyond "
        "`sync=False`. Part of it is the pass over the loss that a step over several ranks makes of its own.",
        markdown([_times(row) for row in results["times"]]),
        "## 8 to 4,096 ranks: a model",
        "Not measured. Latency and bandwidth as stated, formulas in `benchmarks/ranks/model.py`: what the collectives "
        "of one step take, in ms, if nothing hides them. **Bold**: below 1 % of a step of 100 ms. NCCL may take trees "
        'for messages of this size, gloo takes rings. `sync="lagged"` hides the one collective of the default as long '
        "as it takes less than a step.",
        markdown([_model(row) for row in model.rows()]),
        '## `sync="lagged"` on the ranking demo',
        f"10 images, temperature 0.1, Adam 1e-2, {results['demo'][0]['steps']} steps (`examples/demo.py`), "
        "two ranks with half of each batch. Accuracy on test lists in percent. Differences are paired seed by seed, "
        "with their 95 % interval (Student's t). *Worst*: the lowest of all seeds. One process and `sync=True` take "
        "the same step up to the order of sums in float32.",
        markdown(_demo(results["demo"])),
    ]
    return "\n\n".join(parts) + "\n"


def _counts(row: dict[str, Any]) -> dict[str, Any]:
    shown: dict[str, Any] = {key: row[key] for key in ("rule", "layers", "m")}
    for version in ("before", "new"):
        if f"{version} bytes" in row:
            shown[f"{version}: collectives"] = str(row[f"{version} collectives"])
            shown[f"{version}: bytes"] = f"{row[f'{version} bytes']:,}"
    return shown


def _times(row: dict[str, Any]) -> dict[str, Any]:
    shown = {"setting": row["setting"], "ranks": row["ranks"]}
    shown |= {f"{name}, ms": f"{row[name]['tenth']:.2f}" for name in ("no hook", "sync=False")}
    for name, title in (("before, sync=True", "before"), ("new, sync=True", "new"), ("new, lagged", "lagged")):
        local = row.get("sync=False beside it" if title == "lagged" else "sync=False")
        more = {k: row[name][k] - local[k] for k in ("tenth", "median")} if name in row else None
        shown[f"{title} costs, ms"] = f"{more['tenth']:+.2f} (median {more['median']:+.2f})" if more else ""
    return shown


def _model(row: dict[str, Any]) -> dict[str, Any]:
    def cell(value: Any) -> str:
        if isinstance(value, str):
            return value
        words = f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
        return f"**{words}**" if value < model.STEP / 100 else words

    return {key: cell(value) for key, value in row.items()}


def _demo(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    of = {(row["loss"], row["arm"], row["seed"]): row for row in rows}
    first, second, _ = demo.ARMS
    table = []
    for loss in demo.LOSSES:
        seeds = sorted({row["seed"] for row in rows if row["loss"] == loss})
        for arm in demo.ARMS:
            row: dict[str, Any] = {"loss": loss, "seeds": str(len(seeds)), "arm": arm}
            for measure, title in (("full", "whole list"), ("elements", "elements")):
                values = [100 * of[loss, arm, seed][measure] for seed in seeds]
                row |= {title: f"{statistics.mean(values):.1f}", f"{title}, worst": f"{min(values):.1f}"}
                for other in (first, second):
                    apart = [a - 100 * of[loss, other, s][measure] for a, s in zip(values, seeds, strict=True)]
                    earlier = list(demo.ARMS).index(other) < list(demo.ARMS).index(arm)
                    row[f"{title}, against {other}"] = _interval(apart) if earlier else ""
            table.append(row)
    return table


def _interval(apart: list[float]) -> str:
    half = stats.t.ppf(0.975, len(apart) - 1) * statistics.stdev(apart) / math.sqrt(len(apart))
    return f"{statistics.mean(apart):+.1f} ± {half:.1f}"
