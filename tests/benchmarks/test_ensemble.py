"""The benchmark of ensembles times the same training in each of its ways."""

from __future__ import annotations

import pytest
from benchmarks.ensemble import RULES, TASKS, Ways, apart


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("title", TASKS)
def test_all_ways_end_at_the_same_parameters(title: str, rule: str) -> None:
    ways = Ways(TASKS[title], RULES[rule], members=3)
    steps = ways.steps(compiled=False)
    before = ways.found["LossHook"]()
    assert apart(ways, steps) < 1e-12
    assert steps.keys() == ways.found.keys() == {"vmap", "functional", "LossHook"}
    assert any((before[name] != p).any() for name, p in ways.found["LossHook"]().items()), "the networks are trained"


def test_another_rule_is_noticed() -> None:
    title = next(iter(TASKS))
    ways, other = (Ways(TASKS[title], RULES[rule], members=3) for rule in ("plain", "default"))
    steps = {**ways.steps(compiled=False), "vmap": other.vmap()}
    ways.found["vmap"] = other.found["vmap"]
    assert apart(ways, steps) > 1e-3
