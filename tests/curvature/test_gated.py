"""The gated rule: closed forms of its parts, what it must not depend on, and its state."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.twins import relative_error
from torch import Tensor, nn

import newton_plugin as npl
from newton_plugin._curvature.head_sums import HeadRows

N, M, D = 12, 4, 3
WHOLE: dict[str, Any] = {"gate": 0, "most": math.inf}


def batch(seed: int, n: int = N) -> Tensor:
    """Per-sample gradients of uneven lengths."""
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, M, generator=g, dtype=torch.float64) * torch.rand(n, 1, generator=g, dtype=torch.float64).exp()
    )


def wrong(seed: int, n: int = N) -> HeadRows:
    """A third of the samples pull against the others, and further: the gate opens."""
    g = torch.Generator().manual_seed(seed)
    inputs = 1 + torch.randn(n, 1, D, generator=g, dtype=torch.float64) / 3
    way = torch.tensor([1.0, -0.5, -0.3, -0.2], dtype=torch.float64)
    pull = torch.where(torch.arange(n) % 3 == 0, -2.5, 1.0).double()
    noise = torch.randn(n, M, generator=g, dtype=torch.float64) / 5
    return HeadRows((pull[:, None] * way + noise)[:, None], inputs)


def step(rule: npl.GatedFisher, gradient: Tensor, damping: npl.Damping | None = None, **more: Any) -> Any:
    return rule.step(gradient, None, damping or npl.AutoDamping(), **more)


def opened(rule: npl.GatedFisher, damping: npl.Damping, seed: int = 0, batches: int = 25) -> Any:
    """A rule after some batches in which a third is wrong; the last step."""
    taken = None
    for t in range(batches):
        head = wrong(seed + t)
        taken = step(rule, head.gradients[:, 0], damping, head=head)
    return taken


def mean_square(x: Tensor) -> float:
    return float(x.square().sum(-1).mean())


# --- closed forms


def test_a_gate_that_is_shut_gives_every_batch_its_gradients_by_one_length() -> None:
    """gate=0, size="norm": ``g / sqrt(running mean |g|^2)``, by the mean over the first twenty of log length."""
    rule, damping = npl.GatedFisher(size="norm", **WHOLE), npl.AutoDamping()
    sizes: list[float] = []
    logs: list[float] = []
    for t in range(30):
        g = batch(t)
        sizes.append(mean_square(g))
        weights = [0.9 ** (t - k) for k in range(t + 1)]
        running = sum(w * s for w, s in zip(weights, sizes, strict=True)) / sum(weights)
        bound = max(running, sizes[-1] / 9)
        if t < 20:
            logs.append(math.log(bound) / 2)
        want = g / math.sqrt(bound) * math.exp(sum(logs) / len(logs))
        found = step(rule, g, damping)
        torch.testing.assert_close(found.step, want, rtol=1e-12, atol=0)
        if not t:
            torch.testing.assert_close(found.step, g, rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", ["newton", "norm", "signal", "plain"])
@pytest.mark.parametrize("gate", ["conflict", 0, 0.5, 1])
def test_the_first_step_is_as_long_as_its_gradient(size: Any, gate: Any) -> None:
    g = batch(0)
    found = step(npl.GatedFisher(gate=gate, size=size), g, head=wrong(0)).step
    assert mean_square(found) == pytest.approx(mean_square(g), rel=1e-12)


@pytest.mark.parametrize("size", ["newton", "norm", "signal", "plain"])
def test_the_sizes_are_the_powers_of_the_table(size: Any) -> None:
    """Gradients that are a hundredth from the thirtieth batch on, long enough for all running means to follow."""
    rule, damping = npl.GatedFisher(size=size, **WHOLE), npl.AutoDamping(floor=0.0)
    g, a = batch(0), 1e-2
    lengths = [mean_square(step(rule, g if t < 30 else a * g, damping).step) ** 0.5 for t in range(400)]
    ratio = {"newton": 1 / a, "norm": 1.0, "signal": 1.0, "plain": a}[size]  # no head is seen: "signal" is "norm"
    assert lengths[-1] / lengths[0] == pytest.approx(ratio, rel=1e-6)


def test_a_size_that_sees_noise_alone_anneals_with_the_gradient() -> None:
    rule, damping = npl.GatedFisher(gate=0.0, size="signal", most=math.inf), npl.AutoDamping(floor=0.0)
    g, lengths, signals = torch.Generator().manual_seed(0), [], []
    for t in range(300):
        noise = torch.randn(N, M, generator=g, dtype=torch.float64)
        noise = noise - noise.mean(0)  # no signal at all
        noise = noise * (N / noise.square().sum()) ** 0.5 * (1.0 if t < 30 else 1e-2)
        head = HeadRows(noise[:, None], torch.ones(N, 1, 2, dtype=torch.float64) + 0.1 * noise[:, None, :2])
        found = step(rule, noise, damping, head=head)
        lengths.append(mean_square(found.step) ** 0.5)
        signals.append(float(found.readings["signal"]))
    assert signals[-1] < 0.25
    assert lengths[-1] / lengths[29] == pytest.approx(1e-2, rel=1e-6)


def test_a_gate_that_is_open_has_the_weights_of_the_isotropic_fisher() -> None:
    rule, theirs = npl.GatedFisher(gate=1, most=math.inf), npl.EmpiricalFisher("isotropic")
    ours, other = npl.AutoDamping(), npl.AutoDamping()
    for t in range(25):
        g = batch(t) * (5.0 if t == 7 else 1.0)
        a, b = step(rule, g, ours).step, theirs.step(g, None, other).step
        ratio = a / b
        torch.testing.assert_close(ratio, torch.full_like(ratio, float(ratio[0, 0])), rtol=1e-11, atol=0)


def test_a_length_of_newton_is_that_of_the_damped_inverse() -> None:
    """Without a sample's own term, and with gradients of one size, it is the isotropic Fisher's step, all the time."""
    rule, theirs = npl.GatedFisher(size="newton", length="newton", **WHOLE), npl.EmpiricalFisher("isotropic")
    ours, other = npl.AutoDamping(own=0), npl.AutoDamping(own=0)
    for t in range(30):
        g = batch(t)
        g = g * (3.0 / mean_square(g)) ** 0.5
        torch.testing.assert_close(step(rule, g, ours).step, theirs.step(g, None, other).step, rtol=1e-11, atol=0)


@pytest.mark.parametrize("gate", [0, 1])
@pytest.mark.parametrize("most", [0.5, 2.0])
def test_no_sample_counts_for_more_than_the_most(gate: float, most: float) -> None:
    """Relative to the weights of the rule without a bound, which is reached from ``most * mean |g|^2`` on."""
    g = batch(0)
    squared = g.square().sum(-1)
    a = step(npl.GatedFisher(gate=gate, most=most), g).step.norm(dim=-1)
    b = step(npl.GatedFisher(gate=gate, most=math.inf), g).step.norm(dim=-1)
    s = squared.mean() * (1 + 1e-70)
    shrunk = a / b / (a / b).max()
    torch.testing.assert_close(shrunk, (most * s / squared).clamp_max(1).sqrt(), rtol=1e-11, atol=0)
    assert 0 < int((shrunk < 1).sum()) < N


def test_a_batch_counts_for_three_at_the_most() -> None:
    rule, damping = npl.GatedFisher(size="norm", **WHOLE), npl.AutoDamping()
    usual = [step(rule, batch(0), damping).step for _ in range(25)][-1]
    for factor in (10.0, 1e3):
        spare = copy.deepcopy(rule), copy.deepcopy(damping)
        huge = step(spare[0], factor * batch(0), spare[1]).step
        assert mean_square(huge) ** 0.5 / mean_square(usual) ** 0.5 <= 3 * (1 + 1e-12)


def test_p_mixes_weights_as_the_formula_says() -> None:
    rule, damping = npl.GatedFisher(size="plain", most=math.inf), npl.AutoDamping()
    taken = opened(rule, damping)
    p, g = float(taken.readings["gate"]), wrong(24).gradients[:, 0]
    assert 0.2 < p <= 1
    s = float(taken.damping) * M / 0.3
    weights = 1 - p + p * 1.3 / (1.3 + g.square().sum(-1) / s)
    found = (taken.step / g)[:, 0]
    torch.testing.assert_close(found / found[0], weights / weights[0], rtol=1e-11, atol=0)


def test_what_only_is_harder_is_not_evened_out() -> None:
    """The tail pulls the way of the body."""
    rule, damping, gates = npl.GatedFisher(most=math.inf), npl.AutoDamping(), []
    for t in range(30):
        head = wrong(t)
        g = head.gradients * torch.where(torch.arange(N) % 3 == 0, -1.0, 1.0)[:, None, None]
        gates.append(float(step(rule, g[:, 0], damping, head=HeadRows(g, head.inputs)).readings["gate"]))
    assert not any(gates)


def test_a_layer_that_is_not_seen_evens_nothing_out_and_forgets_nothing() -> None:
    rule, damping = npl.GatedFisher(most=math.inf), npl.AutoDamping()
    opened(rule, damping)
    before = copy.deepcopy(rule.state_dict()["conflict"])
    g = batch(3)
    taken = step(rule, g, damping)
    ratio = taken.step / g
    torch.testing.assert_close(ratio, torch.full_like(ratio, float(ratio[0, 0])), rtol=1e-12, atol=0)
    torch.testing.assert_close(rule.state_dict()["conflict"], before, rtol=0, atol=0)
    assert float(opened(rule, damping, 40, 1).readings["gate"]) > 0.2


# --- what it must not depend on

SIZES = st.sampled_from(["newton", "norm", "signal", "plain"])


def run(rule: npl.GatedFisher, change: Any, batches: int = 14, **more: Any) -> list[Tensor]:
    damping, steps = npl.AutoDamping(), []
    for t in range(batches):
        head = change(wrong(t))
        steps.append(step(rule, head.gradients[:, 0], damping, head=head, **more).step)
    return steps


@settings(max_examples=12, deadline=None)
@given(size=SIZES, log=st.floats(-12, 12))
def test_a_factor_on_the_loss_is_a_factor_on_the_step(size: Any, log: float) -> None:
    """Where the length is the gradient's: as in plain training."""
    c = 10.0**log
    plain = run(npl.GatedFisher(size=size), lambda h: h)
    scaled = run(npl.GatedFisher(size=size), lambda h: HeadRows(c * h.gradients, h.inputs))
    for a, b in zip(plain, scaled, strict=True):
        assert relative_error(b, c * a) <= 1e-6  # the standard error of one batch is the root of a rounding
    newton = run(npl.GatedFisher(size=size, length="newton"), lambda h: h)
    scaled = run(npl.GatedFisher(size=size, length="newton"), lambda h: HeadRows(c * h.gradients, h.inputs))
    for a, b in zip(newton, scaled, strict=True):
        assert relative_error(b, a / c) <= 1e-6


@settings(max_examples=8, deadline=None)
@given(size=SIZES, order=st.permutations(range(N)))
def test_the_order_of_samples_does_not_matter(size: Any, order: list[int]) -> None:
    plain = run(npl.GatedFisher(size=size), lambda h: h)
    other = run(npl.GatedFisher(size=size), lambda h: HeadRows(h.gradients[order], h.inputs[order]))
    for a, b in zip(plain, other, strict=True):
        assert relative_error(b, a[order]) <= 1e-6


@settings(max_examples=8, deadline=None)
@given(size=SIZES, unit=st.floats(-3, 3))
def test_the_unit_of_the_layers_inputs_does_not_matter(size: Any, unit: float) -> None:
    plain = run(npl.GatedFisher(size=size), lambda h: h)
    other = run(npl.GatedFisher(size=size), lambda h: HeadRows(h.gradients, 10.0**unit * h.inputs))
    for a, b in zip(plain, other, strict=True):
        assert relative_error(b, a) <= 1e-6


@settings(max_examples=8, deadline=None)
@given(size=SIZES, gate=st.floats(0, 1))
def test_a_batch_twice_is_the_same_batch(size: Any, gate: float) -> None:
    """But for what is told by the number of samples: how much of the batch is signal."""
    ours, theirs = npl.GatedFisher(gate=gate, size=size), npl.GatedFisher(gate=gate, size=size)
    dampings = npl.AutoDamping(), npl.AutoDamping()
    for t in range(25):
        g = batch(t)
        a, b = step(ours, g, dampings[0]).step, step(theirs, torch.cat([g, g]), dampings[1]).step
        assert relative_error(b, torch.cat([a, a])) <= 1e-12


@settings(max_examples=8, deadline=None)
@given(size=SIZES, ignored=st.integers(1, 20))
def test_rows_without_a_gradient_count_for_nothing(size: Any, ignored: int) -> None:
    def padded(h: HeadRows) -> HeadRows:
        zeros, inputs = h.gradients.new_zeros(ignored, 1, M), 100 * h.inputs.new_ones(ignored, 1, D)
        return HeadRows(torch.cat([h.gradients, zeros]), torch.cat([h.inputs, inputs]))

    plain = run(npl.GatedFisher(size=size), lambda h: h)
    other = run(npl.GatedFisher(size=size), padded, live=torch.tensor(float(N), dtype=torch.float64))
    for a, b in zip(plain, other, strict=True):
        assert relative_error(b[:N], a) <= 1e-6
        assert not b[N:].any()


# --- batches that are not as they should be


def test_a_batch_that_is_not_finite_changes_nothing() -> None:
    rule, damping = npl.GatedFisher(), npl.AutoDamping()
    opened(rule, damping)
    before = copy.deepcopy(rule.state_dict())
    for bad in (math.nan, math.inf, 1e200):
        head = wrong(3)
        head.gradients[2, 0, 1] = bad
        taken = step(rule, head.gradients[:, 0], damping, head=head)
        assert taken.finiteness.curvature is not None
        assert not taken.finiteness.curvature
        torch.testing.assert_close(rule.state_dict(), before, rtol=0, atol=0)


def test_an_input_that_is_not_finite_costs_the_batch_its_say_and_no_more() -> None:
    rule, damping = npl.GatedFisher(), npl.AutoDamping()
    opened(rule, damping)
    before = copy.deepcopy(rule.state_dict()["conflict"])
    head = wrong(3)
    head.inputs[0] = math.inf
    taken = step(rule, head.gradients[:, 0], damping, head=head)
    assert torch.isfinite(taken.step).all()
    assert float(taken.readings["gate"]) > 0.2
    torch.testing.assert_close(rule.state_dict()["conflict"], before, rtol=0, atol=0)


@pytest.mark.parametrize("size", ["newton", "norm", "signal", "plain"])
@pytest.mark.parametrize("unit", [0.0, 1e-30, 1e30])
def test_gradients_may_vanish_and_explode(size: Any, unit: float) -> None:
    rule, damping = npl.GatedFisher(size=size), npl.AutoDamping()
    for t in range(30):
        head = wrong(t)
        head = HeadRows(head.gradients * (unit if t % 4 < 2 else 1.0), head.inputs)
        taken = step(rule, head.gradients[:, 0], damping, head=head)
        assert torch.isfinite(taken.step).all()
        assert all(math.isfinite(x) for x in taken.readings.values())


# --- its state


def trained(hook: npl.LossHook, net: nn.Module, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 6, generator=g, dtype=torch.float64)
    target = torch.where(torch.rand(16, generator=g) < 0.6, x[:, :4].argmax(1), torch.randint(4, (16,), generator=g))
    net.zero_grad()
    hook(F.cross_entropy(net(x), target)).backward()
    with torch.no_grad():
        for p in net.parameters():
            assert p.grad is not None
            p -= 0.1 * p.grad
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize("at", [0, 1, 5, 23, 40])
def test_a_saved_training_goes_on_as_if_nothing_had_happened(at: int) -> None:
    torch.manual_seed(0)
    net, hook = nn.Linear(6, 4).double(), npl.LossHook(structure="gated")
    for t in range(at):
        trained(hook, net, t)
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "hook": hook.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, resumed = nn.Linear(6, 4).double(), npl.LossHook(structure="gated")
    other.load_state_dict(saved["net"])
    if at:
        resumed.load_state_dict(saved["hook"])
    for t in range(at, at + 15):
        assert torch.equal(trained(hook, net, t), trained(resumed, other, t))
    if at == 40:
        assert hook.diagnostics()["gate"] > 0
    assert resumed.diagnostics() == hook.diagnostics()


def test_states_of_other_curvatures_are_refused_and_change_nothing() -> None:
    torch.manual_seed(0)
    net = nn.Linear(6, 4).double()
    gated = npl.LossHook(structure="gated")
    for t in range(5):
        trained(gated, net, t)
    before = copy.deepcopy(gated.state_dict())
    others: list[dict[str, Any]] = [
        *({"structure": structure} for structure in ("isotropic", "mean", "per_sample")),
        {"curvature": "norm"},
    ]
    for options in others:
        hook = npl.LossHook(**options)
        for t in range(3):
            trained(hook, net, t)
        mine = copy.deepcopy(hook.state_dict())
        if next(iter(mine["rules"].values()))["curvature"]:
            with pytest.raises(npl.ArgumentError, match="was not saved with curvature=GatedFisher"):
                gated.load_state_dict(hook.state_dict())
            torch.testing.assert_close(gated.state_dict(), before, rtol=0, atol=0, equal_nan=True)
        with pytest.raises(npl.ArgumentError, match="was not saved with curvature="):
            hook.load_state_dict(gated.state_dict())
        torch.testing.assert_close(hook.state_dict(), mine, rtol=0, atol=0, equal_nan=True)
    broken = copy.deepcopy(before)
    next(iter(broken["rules"].values()))["curvature"]["signal"] = {"z": 1.0}
    with pytest.raises(npl.ArgumentError, match="was not saved with curvature=GatedFisher"):
        gated.load_state_dict(broken)
    torch.testing.assert_close(gated.state_dict(), before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("gate", ["conflict", 0.5])
@pytest.mark.parametrize("size", ["newton", "norm", "signal", "plain"])
@pytest.mark.parametrize("decay", [0.9, 0.0])
@pytest.mark.parametrize("seen", [True, False])
def test_the_initial_state_has_the_form_of_every_later_one(gate: Any, size: Any, decay: float, seen: bool) -> None:
    rule, damping = npl.GatedFisher(gate, size), npl.AutoDamping(decay=decay)
    head = wrong(0) if seen else None
    more: dict[str, Any] = {"head": head}
    g = batch(0)
    initial = rule.initial_state(g, damping, **more)
    step(rule, g, damping, **more)

    def form(state: dict[str, Any]) -> Any:
        return {k: form(v) if isinstance(v, dict) else v.shape for k, v in state.items()}

    assert form(rule.state_dict()) == form(initial)
    assert list(rule.state_dict()) == list(initial)
    explicit = npl.GatedFisher(gate, size)
    explicit.load_state_dict(initial)
    rule, dampings = npl.GatedFisher(gate, size), (npl.AutoDamping(decay=decay), npl.AutoDamping(decay=decay))
    for t in range(15):
        more = {"head": wrong(t) if seen else None}
        a, b = (step(r, batch(t), d, **more).step for r, d in zip((rule, explicit), dampings, strict=True))
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


# --- arguments


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"gate": 1.5}, r"gate must be in \[0, 1\]; got 1\.5"),
        ({"gate": math.nan}, r"gate must be in \[0, 1\]; got nan"),
        ({"gate": True}, "gate must be 'conflict', an npl.GradientConflict or a number"),
        ({"gate": "open"}, "gate must be 'conflict'.*got 'open'"),
        ({"gate": npl.GradientConflict}, "gate must be 'conflict'"),
        ({"size": "long"}, "size must be"),
        ({"length": 1.0}, "length must be"),
        ({"most": 0}, "most must be positive"),
        ({"most": math.nan}, "most must be"),
        ({"most": "all"}, "most must be"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(npl.NewtonPluginError, match=match):
        npl.GatedFisher(**arguments)


def test_a_damping_that_is_not_relative_is_refused() -> None:
    with pytest.raises(npl.ArgumentError, match="GatedFisher takes damping='auto' or an npl"):
        npl.newton_step(lambda y: y.square().mean(), batch(0), curvature=npl.GatedFisher(), damping=0.1)
    for options in ({"damping": 0.1}, {"power": 0.5}, {"curvature": "hessian"}):
        with pytest.raises(npl.ArgumentError, match="structure='gated' is a Fisher of power 1 with damping='auto'"):
            npl.LossHook(structure="gated", **options)  # type: ignore[arg-type]


def test_a_gate_of_ones_own_is_copied() -> None:
    gate = npl.GradientConflict(wait=3)
    rules = npl.GatedFisher(gate), npl.GatedFisher(gate)
    opened(rules[0], npl.AutoDamping())
    assert gate.state_dict() == {}
    assert "conflict" not in rules[1].state_dict()
    assert repr(rules[0]) == f"GatedFisher(gate={gate!r}, size='auto' (now 'signal'), length='gradient', most=2)"


@pytest.mark.parametrize(("memoryless", "size"), [(False, "signal"), (True, "plain")])
def test_size_auto_is_the_size_of_the_optimizer(memoryless: bool, size: Any) -> None:
    auto, named = npl.GatedFisher(), npl.GatedFisher(size=size)
    auto.memoryless = memoryless
    for a, b in zip(run(auto, lambda h: h), run(named, lambda h: h), strict=True):
        assert torch.equal(a, b)


class Halved(npl.AutoDamping):
    def value(self, scale: Tensor, finite: bool = False) -> Tensor:
        return scale / 2


@pytest.mark.parametrize("damping", [0.1, npl.Tikhonov(1.0), Halved()])
def test_a_damping_of_another_kind_is_refused_where_it_is_written(damping: Any) -> None:
    with pytest.raises(npl.ArgumentError, match=r"GatedFisher takes damping='auto'"):
        npl.LossHook(curvature=npl.GatedFisher(), damping=damping)


def test_a_rule_that_asks_nothing_of_the_last_layer_does_not_look_for_it() -> None:
    for rule, looks in (
        (npl.GatedFisher(gate=0.0, size="norm"), False),
        (npl.GatedFisher(gate=0.5, size="signal"), True),
        (npl.GatedFisher(size="plain"), True),
    ):
        hook = npl.LossHook(curvature=rule)
        hook(torch.nn.Linear(3, 2)(torch.randn(5, 3)).square().mean()).backward()
        assert bool(hook.boundaries[0].last_layer) is looks


def test_the_size_in_force_is_shown() -> None:
    hook = npl.LossHook(structure="gated")
    layer = torch.nn.Linear(3, 2)
    for optimizer, size in ((torch.optim.SGD, "plain"), (torch.optim.Adam, "signal")):
        hook.set_optimizer(optimizer(layer.parameters(), 0.1))
        hook(layer(torch.randn(5, 3)).square().mean()).backward()
        assert f"size='auto' (now {size!r})" in repr(hook)
