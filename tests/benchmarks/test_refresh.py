"""The benchmark of keeping C for k steps: its table from rows, and one short training."""

from __future__ import annotations

from benchmarks.refresh import interval, table, train


def test_the_interval_of_paired_differences() -> None:
    assert interval([2.0, 2.0, 2.0]) == "+2.0 [+2.0, +2.0]"
    low, high = (float(v) for v in interval([-1.0, 0.0, 4.0])[6:-1].split(", "))
    assert -1.0 <= low < 1.0 < high <= 4.0


def test_the_table_pairs_by_seed() -> None:
    accuracies = {0: [10.0, 20.0], 1: [30.0, 50.0], 5: [29.0, 49.0]}
    rows = [
        {"loss": "L", "curvature": "C" if k else "plain", "every": k, "seed": seed, "steps": 7, "accuracy": value}
        for k, values in accuracies.items()
        # Each arm's rows in another order of the seeds.
        for seed, value in sorted(zip((3, 4), values, strict=True), reverse=k == 5)
    ]
    written = table({"rows": rows, "ratios": {"L": {"C, 1": {"step": 2.0, "period": 2.5}}}})
    assert "2 seeds, 7 steps" in written
    assert "| L | plain |  | 15.0 ± 7.1 |  | 1 | 1 |" in written
    assert "| L | C | 1 | 40.0 ± 14.1 |  | 2.00 | 2.50 |" in written
    assert "| L | C | 5 | 39.0 ± 14.1 | -1.0 [-1.0, -1.0] | nan | nan |" in written


def test_arms_start_equal_and_end_different() -> None:
    loss = "logistic network, n = 5"
    plain, kept, again = (
        train(loss, arm, 3000, 30)["accuracy"]
        for arm in (("plain", 0), ("Hessian, damping 0.1", 5), ("Hessian, damping 0.1", 5))
    )
    assert kept == again != plain
