"""The contradiction of a batch's tail, against the formulas of its docstring in loops over floats."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import newton_plugin as npl
from newton_plugin._curvature.conflict import GradientConflict, Reading

D, N = 5, 9


class Twin:
    """All numbers as Python floats, one at a time."""

    def __init__(
        self, decay: float = 0.98, errors: float = 2.0, factor: float = 2.0, wait: int = 10, signal_decay: float = 0.998
    ) -> None:
        self.decay, self.errors, self.factor, self.wait, self.signal_decay = decay, errors, factor, wait, signal_decay
        self.q: list[float] | None = None
        self.q_weight = 0.0
        self.past: list[list[float]] = []  # of the five means and c squared
        self.signals: list[tuple[float, float]] = []

    def update(self, v: Tensor, body: list[bool]) -> tuple[float, float, float, float]:
        """What is read after one batch; v (N, D) in the unit of the root of s."""
        n = len(body)
        u = [[sum(float(v[i, k]) for i in range(n) if body[i] == side) / n for k in range(D)] for side in (True, False)]
        if self.q is not None:
            metric = [1 / math.sqrt(q + 1e-3 * sum(self.q) / D) for q in self.q]

            def inner(a: list[float], b: list[float]) -> float:
                return sum(x * y * w for x, y, w in zip(a, b, metric, strict=True))

            c = inner(u[0], u[1])
            both = [a + b for a, b in zip(*u, strict=True)]
            own = [
                sum(inner(v[i].tolist(), v[i].tolist()) for i in range(n) if body[i] == s) / n**2 for s in (True, False)
            ]
            own.append(sum(own))
            norms = [inner(x, x) for x in (*u, both)]
            signal = [(norms[k] - own[k]) * n / max(1, n - 1) for k in range(3)]
            self.past.append([c, c * c, *signal[:2], norms[0] - signal[0], norms[1] - signal[1]])
            self.signals.append((signal[2], norms[2]))
        self._metric([(a + b) ** 2 for a, b in zip(*u, strict=True)])
        return self.read()

    def _metric(self, new: list[float]) -> None:
        if self.q is not None:
            limit, size = 10 * math.sqrt(sum(q * q for q in self.q)), math.sqrt(sum(x * x for x in new))
            if size > limit:
                new = [x * limit / size for x in new]
        self.q_weight = 0.99 * self.q_weight + 1
        share = 1 / self.q_weight
        self.q = new if self.q is None else [q + share * (x - q) for q, x in zip(self.q, new, strict=True)]

    def read(self) -> tuple[float, float, float, float]:
        t = len(self.past)
        if not t:
            return 0.0, 0.0, 0.5, 0.0
        weights = [self.decay ** (t - 1 - k) for k in range(t)]
        c, squared, *rest = (
            sum(w * x[k] for w, x in zip(weights, self.past, strict=True)) / sum(weights) for k in range(6)
        )
        error = math.sqrt(max(0.0, squared - c * c) * sum(w * w for w in weights)) / sum(weights)
        s_b, s_t, q_b, q_t = (max(0.0, x) for x in rest)
        kappa = max(0.0, -c - self.errors * error) / math.sqrt((s_b + q_b / 10) * (s_t + q_t / 10))
        weights = [self.signal_decay ** (t - 1 - k) for k in range(t)]
        share = sum(w * x for w, (x, _) in zip(weights, self.signals, strict=True)) / sum(
            w * x for w, (_, x) in zip(weights, self.signals, strict=True)
        )
        p = min(1.0, self.factor * kappa) if t > self.wait else 0.0
        tail = s_t / (s_b + s_t) if s_t else 0.0
        lifted = (1 - p) * max(0.0, 4 * tail - 3) if t > self.wait else 0.0
        return p, kappa, min(1.0, max(0.0, share)), lifted


def batch(t: int, contrary: float = 1.0, n: int = N) -> tuple[Tensor, list[bool]]:
    """Gradients whose tail pulls against its body."""
    g = torch.Generator().manual_seed(t)
    body = [i % 3 != 0 for i in range(n)]
    way = torch.linspace(0.2, 1.0, D, dtype=torch.float64)
    v = torch.stack([way * (1.0 if inside else -2.0 * contrary) for inside in body])
    return v + 0.7 * torch.randn(n, D, generator=g, dtype=torch.float64), body


def take(conflict: GradientConflict, v: Tensor, body: list[bool], count: int | None = None) -> Reading:
    groups = torch.tensor([[float(b) for b in body], [float(not b) for b in body]], dtype=torch.float64)
    metric = conflict.metric(v[0])
    n = torch.tensor(float(len(v) if count is None else count), dtype=torch.float64)
    conflict.update(groups @ v, (groups @ v.square()) @ metric, metric, n)
    return conflict.read(n)


@pytest.mark.parametrize(
    "constants",
    [{}, {"decay": 0.7, "errors": 0.5, "factor": 0.3, "wait": 3, "signal_decay": 0.9}, {"wait": 0}],
    ids=str,
)
@pytest.mark.parametrize("contrary", [1.0, 0.1, -1.0])
def test_it_is_what_the_formulas_say(constants: dict[str, Any], contrary: float) -> None:
    conflict, twin = GradientConflict(**constants), Twin(**constants)
    opened = []
    for t in range(40):
        v, body = batch(t, contrary * (4.0 if t == 20 else 1.0))
        if t == 25:
            v = 50 * v  # bounded in the metric
        want, found = twin.update(v, body), take(conflict, v, body)
        for ours, theirs in zip(found, want, strict=True):
            assert float(ours) == pytest.approx(theirs, rel=1e-9, abs=1e-12)
        opened.append(want[0])
    if contrary == 1.0:
        assert max(opened) > 0.25  # else the test says little
    if contrary == -1.0:
        assert max(opened) == 0


def test_the_first_batch_counts_for_nothing_and_ten_more_are_waited_for() -> None:
    conflict = GradientConflict()
    found = [take(conflict, *batch(t)) for t in range(14)]
    assert [float(r.contradiction) for r in found[:1]] == [0]
    assert float(found[0].signal) == 0.5
    assert all(float(r.opened) == 0 for r in found[:11])
    assert all(float(r.contradiction) > 0 for r in found[2:])
    assert all(float(r.opened) > 0 for r in found[11:])


def test_a_batch_that_is_not_finite_leaves_everything_as_it_was() -> None:
    conflict = GradientConflict()
    for t in range(15):
        take(conflict, *batch(t))
    before = {k: {n: t.clone() for n, t in v.items()} for k, v in conflict.state_dict().items()}
    read = take(conflict, *batch(14))
    for k, v in before.items():  # a batch changes all of them
        assert not torch.equal(v["mean"], conflict.state_dict()[k]["mean"])
    conflict.load_state_dict(before)
    v, body = batch(15)
    for bad in (math.nan, math.inf):
        v[1, 2] = bad
        found = take(conflict, v, body)
        assert all(torch.equal(t, conflict.state_dict()[k][n]) for k, part in before.items() for n, t in part.items())
        assert all(torch.isfinite(x) for x in found)
    assert torch.equal(take(conflict, *batch(14)).opened, read.opened)


def test_nothing_is_contradicted_where_nothing_has_a_gradient() -> None:
    conflict = GradientConflict(wait=0)
    v, body = batch(0)
    for _ in range(5):
        found = take(conflict, 0 * v, body)
        assert [float(x) for x in found] == [0, 0, 0.5, 0]
    opened = [float(take(conflict, *batch(t)).opened) for t in range(20)]  # and it begins afresh afterwards
    assert 0 < opened[-1] <= 1


def test_one_sample_is_no_contradiction() -> None:
    conflict = GradientConflict(wait=0)
    for t in range(5):
        found = take(conflict, batch(t)[0][:1], [True])
        assert all(torch.isfinite(x) for x in found)
        assert float(found.opened) == 0


def test_a_factor_on_all_gradients_of_the_metric_changes_no_cosine() -> None:
    plain, scaled = GradientConflict(), GradientConflict()
    for t in range(15):
        v, body = batch(t)
        a, b = take(plain, v, body), take(scaled, 7.0 * v, body)
        for x, y in zip(a, b, strict=True):
            # The error of one value is the root of a rounding.
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-12)


def test_the_state_before_the_first_batch_is_none() -> None:
    conflict, explicit = GradientConflict(), GradientConflict()
    explicit.load_state_dict(explicit.initial_state(D, torch.zeros((), dtype=torch.float64)))
    for t in range(14):
        a, b = take(conflict, *batch(t)), take(explicit, *batch(t))
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        if t:
            theirs = explicit.state_dict()
            assert all(
                torch.equal(x, theirs[k][n]) for k, part in conflict.state_dict().items() for n, x in part.items()
            )


def test_other_widths_begin_afresh() -> None:
    conflict = GradientConflict(wait=0)
    for t in range(5):
        take(conflict, *batch(t))
    before = conflict.state_dict()["means"]["mean"].clone()
    v, body = batch(5)
    take(conflict, v[:, :3], body)
    assert torch.equal(conflict.state_dict()["means"]["mean"], before)
    assert conflict.state_dict()["metric"]["mean"].shape == (3,)


@pytest.mark.parametrize(
    ("constants", "match"),
    [
        ({"decay": 1.0}, "decay must be in"),
        ({"decay": 0.0}, "decay must be above 0"),
        ({"signal_decay": 0}, "signal_decay must be above 0"),
        ({"errors": -1}, "errors must be in"),
        ({"factor": 0.0}, "factor must be positive"),
        ({"wait": -1}, "wait must be in"),
        ({"wait": 1000}, r"wait must be at most 569 batches with decay=0\.98"),
        ({"decay": 0.5, "wait": 17}, r"wait must be at most 16 batches with decay=0\.5"),
        ({"wait": "long"}, "wait must be a number"),
    ],
)
def test_wrong_constants(constants: dict[str, Any], match: str) -> None:
    with pytest.raises(npl.NewtonPluginError, match=match):
        npl.GradientConflict(**constants)


def test_the_longest_wait_ends() -> None:
    conflict = GradientConflict(decay=0.5, wait=16)
    opened = [float(take(conflict, *batch(t)).opened) for t in range(20)]
    assert not any(opened[:17])
    assert all(opened[17:])


def test_it_shows_its_constants() -> None:
    assert repr(npl.GradientConflict(wait=3)) == (
        "GradientConflict(decay=0.98, errors=2, factor=2, wait=3, signal_decay=0.998)"
    )
