"""From lines without training to figures, verdict, table and picture."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from newton_plugin_lightning._compare.arms import arms_from_words
from newton_plugin_lightning._compare.lines import Line, Lines
from newton_plugin_lightning._compare.picture import draw, mean_curve
from newton_plugin_lightning._compare.plan import Plan, check_plan, rate_word
from newton_plugin_lightning._compare.results import Results, results_of
from newton_plugin_lightning._compare.table import report
from newton_plugin_lightning._compare.verdict import verdict

RATES = (1 / 3, 1.0, 3.0)
Figure = Callable[[int, str, float], float | None]


def plan(
    seeds: int = 8, mode: Literal["max", "min"] = "max", rates: Any = RATES, arms: Any = ("default", "norm")
) -> Plan:
    return check_plan("val/x", mode, seeds, arms_from_words(arms), rates)


def lines_of(plan: Plan, figure: Figure, rates: tuple[float, ...] = (0.01,)) -> dict[Any, Line]:
    """The lines of runs whose metric is a function of seed, arm and rate; None: the run failed."""
    made = []
    for run in plan.runs():
        value = figure(*run.key)
        curve = [] if value is None else [[1, value / 2], [2, value]]
        failed = "it is nan" if value is None else None
        made.append(Line(*run.key, value, failed, [rate * run.rate for rate in rates], curve, []))
    return {line.key: line for line in made}


def found(plan: Plan, figure: Figure) -> Results:
    return results_of(plan, lines_of(plan, figure))


def noise(seed: int, arm: str, rate: float) -> float:
    return float(torch.randn(1, generator=torch.Generator().manual_seed(hash_of(seed, arm, rate))))


def hash_of(seed: int, arm: str, rate: float) -> int:
    return sum(map(ord, arm)) * 1009 + seed * 101 + round(rate * 10)


def test_an_arm_that_is_ahead() -> None:
    """Plain is best at three times its rate, and what remains of the gain there is told."""

    def figure(seed: int, arm: str, rate: float) -> float:
        best = {"plain": 3.0, "default": 1.0, "norm": 1.0}[arm]
        return 90 + (arm == "default") * 2 + 0.1 * noise(seed, arm, rate) - 3 * (rate != best)

    said = verdict(found(plan(), figure))
    assert said.startswith(
        "With the same three learning rates tried for every arm (0.00333, 0.01, 0.03) on 8 seeds, "
        "default (at 0.01) is ahead of plain (at 0.03) by "
    )
    assert re.search(
        r"by 2\.\d+ \[[12]\.\d+, 2\.\d+\], p = 0\.016; no difference from plain is found for norm [+-]0\.", said
    )
    assert re.search(r"plain's own mean is (89|90)\.\d+ at 0\.03 and 8[67]\.\d+ at your 0\.01;", said)
    assert "the best rate of plain is the largest tried, so larger ones may be better" in said


def test_an_arm_that_is_behind_where_smaller_is_better() -> None:
    said = verdict(
        found(plan(mode="min"), lambda s, a, r: 1.0 + (a == "norm") * 0.5 + 0.01 * noise(s, a, r) + (r != 1))
    )
    assert re.search(r"norm \(at 0.01\) is behind plain \(at 0.01\) by 0\.5\d* \[0\.4\d*, 0\.5\d*\], p = 0\.016", said)
    assert "try" not in said


def test_a_gain_that_a_learning_rate_gives_too_is_no_finding() -> None:
    """At the user's own rate the default is far ahead; at plain's best rate it is not."""

    def figure(seed: int, arm: str, rate: float) -> float:
        return 90 + 0.1 * noise(seed, arm, rate) - (10 * (rate != 1 / 3) if arm == "plain" else 0)

    results = found(plan(arms=["default"]), figure)
    untuned = results.row("default", 1.0).to_plain
    assert untuned is not None
    assert untuned.mean == pytest.approx(10, abs=0.5)
    said = verdict(results)
    assert "no difference from plain is found for default" in said
    assert re.search(
        r"plain's own mean is (89|90)\.\d+ at 0\.00333 and (79|80)\.\d+ at your 0\.01: try that first", said
    )


def test_too_few_seeds_find_nothing_whatever_the_figures() -> None:
    said = verdict(found(plan(seeds=5), lambda s, a, r: 100.0 * (a == "default") + 0.01 * noise(s, a, r)))
    assert (
        "no difference can be shown (the smallest p of 2 comparisons with so few is 0.125; 7 seeds can show one)"
        in said
    )
    assert "which is no finding yet" in said
    assert "ahead" not in said


def test_one_rate_is_said_to_be_untuned() -> None:
    said = verdict(found(plan(rates=[1]), lambda s, a, r: noise(s, a, r)))
    assert said.startswith("At your learning rate alone (0.01, tuned for no arm) and 8 seeds, no difference")
    assert "tried" not in said


def test_a_null_problem_gives_a_null_verdict() -> None:
    """With two arms beside plain, at most 5 % of verdicts may name one."""
    wrong = 0
    made = plan()
    for problem in range(100):
        generator = torch.Generator().manual_seed(problem)
        drawn = {run.key: float(torch.randn(1, generator=generator)) for run in made.runs()}
        said = verdict(found(made, lambda *key, drawn=drawn: drawn[key]))
        wrong += "ahead" in said or "behind" in said
        assert ("no difference from plain is found for default" in said) or wrong
    assert wrong <= 100 * 0.05 + 3 * (100 * 0.05 * 0.95) ** 0.5


def test_failed_runs_count_as_the_worst_and_are_told() -> None:
    def figure(seed: int, arm: str, rate: float) -> float | None:
        if arm == "default" and (rate == 3 or seed == 2):
            return None
        return 10.0 + seed + (arm == "default") * 5 + 0.01 * noise(seed, arm, rate)

    results = found(plan(arms=["default"]), figure)
    row = results.row("default", 1.0)
    assert (row.failed, results.row("default", 3.0).failed) == (1, 8)
    finished = [15.0 + seed for seed in range(8) if seed != 2]
    assert row.mean == pytest.approx((sum(finished) + 10) / 8, abs=0.02)  # 10: the worst of any run
    assert results.chosen("default").rate != 3
    page = report(results)
    assert "| 1 of 8 |" in page
    assert "| 8 of 8 |" in page
    assert "* default failed 10 times: it is nan" in page
    assert "with 1 runs of default that failed" in verdict(results)


def test_the_table_holds_the_figures() -> None:
    made = plan(seeds=7, arms=["default"], rates=[1])
    page = report(found(made, lambda s, a, r: float(s) + (a == "default")), ["A note."])
    assert "# val/x at the end of training (larger is better), 7 seeds" in page
    assert "| default | 0.01 | 4.0 (2.2) | 0.01 | 3.0 (2.2) | +1.0 [1.0, 1.0] | 0.0156 | 0.0156 |" in page
    assert "| plain | 0.01 * | 3.0 (2.2) | 0 |  |" in page
    assert "\n* A note.\n" in page
    assert page.endswith(".\n")
    assert page.splitlines()[-1].startswith("Verdict: At your learning rate alone")


def test_several_learning_rates_are_named_by_their_factor() -> None:
    made = plan(arms=["default"])
    results = results_of(made, lines_of(made, noise, rates=(0.01, 0.1)))
    assert [row.rate_name for row in results.rows[:3]] == ["x1/3", "x1", "x3"]


@pytest.mark.parametrize(("rate", "word"), [(1 / 3, "x1/3"), (0.1, "x1/10"), (2.5, "x5/2"), (0.123, "x0.123")])
def test_rate_words(rate: float, word: str) -> None:
    assert rate_word(rate) == word


def test_the_first_run_is_plain_at_the_users_rate() -> None:
    runs = plan().runs()
    assert runs[0].key == (0, "plain", 1.0)
    assert len(runs) == 8 * 3 * 3
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    assert str(runs[1]) == "seed 0, plain, x1/3"


def test_lines_are_in_the_plans_order_whatever_order_they_come_in(tmp_path: Path) -> None:
    made = plan(seeds=2)
    all_lines = list(lines_of(made, noise).values())
    texts = []
    for order in (all_lines, all_lines[::-1]):
        path = tmp_path / f"{len(texts)}.jsonl"
        kept = Lines(path, made, {"module": "a"})
        for line in order:
            kept.add(line)
        texts.append(path.read_bytes())
        assert Lines(path, made, {"module": "a"}).lines == kept.lines
    assert texts[0] == texts[1]
    assert list(tmp_path.glob("*.new")) == []


def test_a_write_that_is_cut_off_leaves_the_lines_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan(seeds=2)
    first, second, *_ = lines_of(made, noise).values()
    kept = Lines(tmp_path / "runs.jsonl", made, {})
    kept.add(first)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        kept.add(second)
    assert list(Lines(tmp_path / "runs.jsonl", made, {}).lines.values()) == [first]


def test_mean_curves_join_the_steps_that_all_have() -> None:
    curve = mean_curve([[[1, 1.0], [2, 2.0]], [[2, 4.0], [3, 0.0]]])
    assert [tuple(point) for point in curve] == [(2, 3.0, pytest.approx(2**0.5))]
    assert mean_curve([]) == []


def test_without_matplotlib_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan(seeds=2, rates=[1])
    read = lines_of(made, noise)
    assert draw(results_of(made, read), read, tmp_path / "curves.png") is None
    assert (tmp_path / "curves.png").stat().st_size > 1000
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "matplotlib is not installed" in str(draw(results_of(made, read), read, tmp_path / "none.png"))
    assert not (tmp_path / "none.png").exists()
