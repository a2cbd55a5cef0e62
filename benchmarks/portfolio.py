"""Decision-focused portfolio selection, the whole study behind ``examples/portfolio.py``.

    python -m benchmarks.portfolio [--seeds 10] [--quick]

Every method gets the same search: 8 settings (learning rate, steps), 3 seeds each, trained on 1990-2010
and judged by the mean decision regret of 2011-15. The best setting is trained again with fresh seeds and looked at
once on 2016-22. Intervals are 95 % from a block bootstrap of the weeks (blocks of 8, 4000 draws; the figure of a draw
is the mean over seeds); "+-" is the deviation over seeds. Writes results/portfolio.json and .md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path

import torch
from benchmarks.tables import markdown
from examples import portfolio as example
from examples.portfolio_data import WEEK, YEAR, Part, load
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
GRID = [
    {"learning_rate": rate, "steps": steps} for rate, steps in itertools.product((3e-4, 1e-3, 3e-3, 1e-2), (100, 300))
]
YEARLY = (YEAR / WEEK) ** 0.5


def weekly(method: str, part: Part, seed: int, setting: dict) -> dict[str, Tensor]:
    """Train and evaluate: regret and net return of every week, turnover of every change."""
    network = example.train(method, seed=seed, **setting)
    weeks = load(part)
    with torch.no_grad():
        weights = example.allocate(network(weeks.features), weeks.covariance)
    return example.evaluate(weights, part)


def search(method: str, grid: list[dict], seeds: int) -> list[tuple[float, dict]]:
    """Mean validation regret of each setting, the best first."""
    scores = []
    for setting in grid:
        runs = [weekly(method, "validation", seed, setting)["regret"].mean().item() for seed in range(seeds)]
        scores.append((statistics.mean(runs), setting))
    return sorted(scores, key=lambda pair: pair[0])


def draws(weeks: int, count: int = 4000, block: int = 8) -> Tensor:
    """Indices (count, weeks) of a circular block bootstrap."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(weeks, (count, -(-weeks // block)), generator=generator)
    return ((starts.unsqueeze(-1) + torch.arange(block)).flatten(1) % weeks)[:, :weeks]


def sharpe(net: Tensor) -> Tensor:
    """Yearly, of weekly returns along the last dimension."""
    return YEARLY * net.mean(-1) / net.std(-1)


def interval(values: Tensor) -> list[float]:
    return torch.quantile(values, torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()


def summary(runs: dict[str, list[dict[str, Tensor]]]) -> list[dict]:
    """One row for each method: regret, its difference to two others (paired by week), Sharpe, turnover."""
    stacked = {m: {k: torch.stack([r[k] for r in rs]) for k in rs[0]} for m, rs in runs.items()}
    index = draws(next(iter(stacked.values()))["regret"].shape[-1])
    mean_regret = {m: s["regret"].mean(0) for m, s in stacked.items()}
    rows = []
    for method, s in stacked.items():
        row: dict = {"method": method, "seeds": len(s["regret"])}
        per_seed = s["regret"].mean(-1)
        row |= {"regret": per_seed.mean().item(), "regret_sd": per_seed.std(correction=0).item()}
        for other in ("two-stage", "end to end"):
            difference = mean_regret[method] - mean_regret[other]
            low, high = interval(difference[index].mean(-1))
            row[f"less {other}"] = difference.mean().item()
            row[f"less {other}, 95 %"] = [low, high]
        per_seed = sharpe(s["net"])
        row |= {"sharpe": per_seed.mean().item(), "sharpe_sd": per_seed.std(correction=0).item()}
        row["sharpe, 95 %"] = interval(torch.stack([sharpe(net[index]) for net in s["net"]]).mean(0))
        row["turnover"] = s["turnover"].mean().item()
        rows.append(row)
    return rows


def readable(row: dict) -> dict:
    def between(key: str) -> str:
        low, high = row[key]
        return f"[{low:.3f}, {high:.3f}]"

    out = {"method": row["method"], "regret, % a week": f"{row['regret']:.3f} +- {row['regret_sd']:.3f}"}
    for other in ("two-stage", "end to end"):
        key = f"less {other}"
        out[f"minus {other}"] = "" if row["method"] == other else f"{row[key]:+.3f} {between(key + ', 95 %')}"
    out["net Sharpe"] = f"{row['sharpe']:.2f} +- {row['sharpe_sd']:.2f} {between('sharpe, 95 %')}"
    out["turnover a week"] = f"{row['turnover']:.2f}"
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="two settings, one seed to search, two to test")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    grid, search_seeds, seeds = (GRID[:2], 1, 2) if options.quick else (GRID, 3, options.seeds)
    chosen: dict[str, dict] = {}
    runs: dict[str, list[dict[str, Tensor]]] = {}
    weeks = load("test")
    runs["equal weights"] = [example.evaluate(torch.full_like(weeks.returns, 1 / weeks.returns.shape[-1]), "test")]
    least = example.allocate(torch.zeros_like(weeks.returns), weeks.covariance)
    runs["least variance"] = [example.evaluate(least, "test")]
    for method in example.LOSSES:
        start = time.perf_counter()
        scores = search(method, grid, search_seeds)
        chosen[method] = {"validation_regret": scores[0][0], **scores[0][1], "search": scores}
        runs[method] = [weekly(method, "test", 100 + seed, scores[0][1]) for seed in range(seeds)]
        regret = torch.stack([r["regret"] for r in runs[method]]).mean()
        print(f"{method}: {scores[0]}, test {regret:.4f}, {time.perf_counter() - start:.0f} s", flush=True)
    rows = summary(runs)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "portfolio.json").write_text(json.dumps({"rows": rows, "chosen": chosen}, indent=1) + "\n")
    settings = [{"method": m, **{k: v for k, v in c.items() if k != "search"}} for m, c in chosen.items()]
    note = f"{len(weeks)} weeks of 2016-22, {seeds} seeds. Made by `python -m benchmarks.portfolio`."
    text = "\n\n".join([note, markdown([readable(r) for r in rows]), "Chosen on 2011-15:", markdown(settings)])
    (options.out / "portfolio.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
