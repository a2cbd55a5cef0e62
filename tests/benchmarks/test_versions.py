"""Old against new: results of one version are equal; a change of a number, a message or a state is noticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.versions.__main__ import main
from benchmarks.versions.all_cases import GROUPS, all_cases
from benchmarks.versions.compare import compare, differences
from benchmarks.versions.plain import DIGEST, plain

EVERY = "301"  # of the cases of each group, some forty
NUMBER = torch.tensor([1.0, -2.0, float("nan"), float("inf")], dtype=torch.float64)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of a few cases of every group."""
    out = tmp_path_factory.mktemp("versions") / "old.pt"
    assert main(["write", str(out), "--every", EVERY]) == 0
    return out


def _changed(written: Path, change: Any) -> Path:
    saved = torch.load(written, weights_only=True)
    change(saved)
    out = written.with_name("changed.pt")
    torch.save(saved, out)
    return out


def _mean(rule: dict[str, Any]) -> torch.Tensor | None:
    """The running mean of a rule's curvature; that of a gated one lies a level deeper."""
    mean = rule["curvature"].get("mean")
    return mean["mean"] if isinstance(mean, dict) else mean


def _hook_with_a_mean(saved: dict[str, Any]) -> str:
    """A case whose LossHook keeps a running mean."""
    for key, state in saved["states"].items():
        if key.startswith("steps: LossHook") and any(_mean(rule) is not None for rule in state["rules"].values()):
            return key
    raise AssertionError("no case keeps a running mean")


def test_written_twice_is_equal(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = written.with_name("again.pt")
    assert main(["write", str(again), "--every", EVERY]) == 0
    assert main(["compare", str(written), str(again)]) == 0
    printed = capsys.readouterr().out
    assert all(f"| {group} | " in printed for group in GROUPS)
    assert "Both files are of the same source" in printed


def test_another_versions_states_are_loaded(written: Path) -> None:
    crossed = written.with_name("crossed.pt")
    assert main(["write", str(crossed), "--every", EVERY, "--states", str(written)]) == 0
    assert main(["compare", str(written), str(crossed)]) == 0

    def change(saved: dict[str, Any]) -> None:
        rules = saved["states"][_hook_with_a_mean(saved)]["rules"]
        for rule in rules.values():
            mean = _mean(rule)
            assert mean is not None
            mean *= 1 + 1e-6

    changed = _changed(written, change)
    assert main(["write", str(crossed), "--every", EVERY, "--states", str(changed)]) == 0
    assert main(["compare", str(written), str(crossed)]) == 1


def test_one_number_that_differs_is_named(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = []

    def change(saved: dict[str, Any]) -> None:
        names.append(_hook_with_a_mean(saved))
        saved["results"][names[0]]["step 4, gradients"]["trunk.weight"][0, 0] *= 1 + 1e-10

    changed = _changed(written, change)
    assert main(["compare", str(written), str(changed)]) == 1
    printed = capsys.readouterr().out
    assert names[0] in printed
    assert "step 4, gradients / trunk.weight" in printed
    assert main(["compare", str(written), str(changed), "--tolerance", "1e-9"]) == 0


def test_a_case_that_is_missing_is_a_failure(written: Path) -> None:
    changed = _changed(written, lambda saved: saved["results"].popitem())
    assert main(["compare", str(written), str(changed)]) == 1
    assert main(["compare", str(changed), str(written)]) == 1


def test_case_names_are_unique_and_thousands() -> None:
    keys = [case.key for case in all_cases()]
    assert len(set(keys)) == len(keys) >= 5000


@pytest.mark.parametrize(
    ("old", "new", "fails"),
    [
        ("a message", "a message", False),
        ("a message", "another", True),
        (1, 2, True),
        (1, 1.0, True),
        (None, 0.0, True),
        (float("nan"), float("nan"), False),
        (1.0, 1 + 1e-15, False),
        (1.0, 1 + 1e-13, True),
        (NUMBER, NUMBER.clone(), False),
        (NUMBER, NUMBER * (1 + 1e-13), True),
        (NUMBER, NUMBER.nan_to_num(0.0), True),
        (NUMBER, -NUMBER, True),
        (NUMBER, NUMBER.float(), True),
        (NUMBER, NUMBER[:3], True),
        (NUMBER.float(), NUMBER.float() * (1 + 2e-7), False),
        (NUMBER.float(), NUMBER.float() * (1 + 1e-5), True),
        ([1, 2], [1], True),
        ({"a": 1}, {"a": 1, "b": 1}, True),
        ({"a": 1, "b": 1}, {"a": 1}, True),
        (torch.tensor([True]), torch.tensor([False]), True),
    ],
)
def test_what_counts_as_different(old: Any, new: Any, fails: bool) -> None:
    groups = compare({"group: case": plain(old)}, {"group: case": plain(new)})
    assert bool(groups["group"].failures) == fails


def test_large_tensors_are_compared_by_a_digest() -> None:
    large = torch.linspace(1, 2, 100_000, dtype=torch.float64)
    old = plain(large)
    assert DIGEST in old
    assert not list(differences(old, plain(large.clone())))
    assert any(d.exceeds(2e-14) for d in differences(old, plain(large * (1 + 1e-12))))
    large[1] += 1e-15  # an element that is not kept: no failure, and not equal to the bit
    found = list(differences(old, plain(large)))
    assert found
    assert not any(d.exceeds(2e-14) for d in found)
