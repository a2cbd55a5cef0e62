"""What one step promises: its length, its estimator, what it touches and what it leaves alone."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from newton_plugin import ArgumentError, ArgumentTypeError, NewtonPluginError, NoGradientError, NonFiniteError
from newton_plugin.bilevel import BOREP, MASOBA, AccBO, GradScalerError, StocBiO
from newton_plugin.bilevel._hypergradient.estimate import LinearSystem

METHODS = [AccBO, MASOBA, BOREP, StocBiO]
every_method = pytest.mark.parametrize("method", METHODS)
RATES = {"lr_upper": 0.03, "lr_lower": 0.05}


class Cleaning:
    """Per-sample weights above a small network with dropout and BatchNorm; batches drawn by the caller."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(3)
        self.z = torch.randn(40, 4, generator=generator, dtype=dtype)
        self.labels = torch.randint(0, 3, (40,), generator=generator)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)
            ).to(dtype)
            for p in self.net.parameters():
                p.data += 0.1  # no zeros, so that a step of 1e-300 is none
        self.weights = torch.full((40,), 0.3, dtype=dtype, requires_grad=True)
        self.batch = torch.arange(20)

    def upper(self) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(self.z[20:]), self.labels[20:])
        return loss + 1e-3 * self.weights.square().sum()

    def lower(self) -> Tensor:
        losses = nn.functional.cross_entropy(self.net(self.z[self.batch]), self.labels[self.batch], reduction="none")
        decay = sum(p.square().sum() for p in self.net.parameters())
        return (self.weights[self.batch].sigmoid() * losses).mean() + 0.01 * decay

    def optimizer(self, method: Any, **options: Any) -> Any:
        return method([self.weights], self.net.parameters(), **{**RATES, **options})

    def parameters(self) -> list[Tensor]:
        return [p.detach().clone() for p in [self.weights, *self.net.parameters()]]


def _assert_equal(a: list[Tensor], b: list[Tensor]) -> None:
    for s, t in zip(a, b, strict=True):
        assert torch.equal(s, t)


@pytest.mark.parametrize("method", [AccBO, BOREP])
@pytest.mark.parametrize("solver", ["linear", "neumann", "cg"])
def test_normalised_steps_have_the_length_lr_upper(method: Any, solver: str) -> None:
    torch.manual_seed(0)
    problem = Cleaning()
    optimizer = problem.optimizer(method, solver=solver)
    for _ in range(4):
        before = problem.weights.detach().clone()
        optimizer.step(problem.upper, problem.lower)
        assert float((problem.weights.detach() - before).norm()) == pytest.approx(0.03, rel=1e-12)


def _recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[list[Tensor]]]:
    """Every h at the new and at the old point."""
    seen: dict[str, list[list[Tensor]]] = {"new": [], "old": []}
    estimate, again = LinearSystem.estimate, LinearSystem.again

    def spy_new(self: LinearSystem, *args: Any) -> Any:
        found = estimate(self, *args)
        seen["new"].append(found.h)
        return found

    def spy_old(self: LinearSystem, *args: Any) -> Any:
        monkeypatch.setattr(LinearSystem, "estimate", estimate)
        found = again(self, *args)
        monkeypatch.setattr(LinearSystem, "estimate", spy_new)
        seen["old"].append(found)
        return found

    monkeypatch.setattr(LinearSystem, "estimate", spy_new)
    monkeypatch.setattr(LinearSystem, "again", spy_old)
    return seen


@pytest.mark.parametrize("solver", ["linear", "neumann", "cg"])
@pytest.mark.parametrize("hvp", ["autograd", "finite_difference"])
# The lower loss is not convex at the start, and the scale changes in between.
@pytest.mark.filterwarnings("ignore::newton_plugin.bilevel.DivergenceWarning")
def test_at_a_frozen_point_the_old_hypergradient_is_the_new_one_bitwise(
    solver: str, hvp: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under dropout, in training mode: the same masks, the same statistics."""
    seen = _recorded(monkeypatch)
    torch.manual_seed(0)
    problem = Cleaning()
    # Steps too small to change a float64; the linear solver's v moves too, unless its step is as small.
    options: dict[str, Any] = {"solver": solver, "hvp": hvp, "lr_upper": 1e-300, "lr_lower": 1e-300}
    optimizer = problem.optimizer(AccBO, **options)
    before = problem.parameters()
    optimizer.step(problem.upper, problem.lower)
    if solver == "linear":
        held = torch.optim.Optimizer.state_dict(optimizer)
        optimizer = problem.optimizer(AccBO, **options, scale=1e-300)
        optimizer.load_state_dict(held)
        for p in problem.net.parameters():
            optimizer.state[p]["point_solution"] = optimizer.state[p]["solution"]
    for _ in range(3):
        optimizer.step(problem.upper, problem.lower)
    _assert_equal(problem.parameters(), before)
    assert len(seen["new"]) == 4
    for new, old in zip(seen["new"][1:], seen["old"], strict=True):
        assert float(new[0].norm()) > 1e-6
        _assert_equal(new, old)
    assert not torch.equal(seen["new"][1][0], seen["new"][2][0])  # the next step has other masks


def test_the_direction_is_not_the_last_hypergradient(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = _recorded(monkeypatch)
    torch.manual_seed(0)
    problem = Cleaning()
    optimizer = problem.optimizer(AccBO)
    for step in range(3):
        optimizer.step(problem.upper, problem.lower)
        m, h = optimizer.state[problem.weights]["momentum"], seen["new"][-1][0]
        assert torch.equal(m, h) == (step == 0)
        if step:
            assert float((m - h).norm()) > 1e-3 * float(h.norm())


@every_method
def test_old_gradients_change_nothing_and_stay(method: Any) -> None:
    ends = []
    for filled in (False, True):
        torch.manual_seed(0)
        problem = Cleaning()
        optimizer = problem.optimizer(method)
        if filled:
            for p in [problem.weights, *problem.net.parameters()]:
                p.grad = torch.full_like(p, 3.0)
        for _ in range(3):
            optimizer.step(problem.upper, problem.lower)
        if filled:
            for p in [problem.weights, *problem.net.parameters()]:
                assert torch.equal(p.grad, torch.full_like(p, 3.0))
        else:
            assert all(p.grad is None for p in [problem.weights, *problem.net.parameters()])
        ends.append(problem.parameters())
    _assert_equal(*ends)


@settings(deadline=None, derandomize=True, max_examples=12)
@given(cut=st.integers(1, 5), method=st.sampled_from(METHODS))
def test_splitting_a_tensor_changes_nothing(cut: int, method: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    target, start = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    ends = []
    for sizes in ([6], [cut, 6 - cut]):
        x = [t.clone().requires_grad_() for t in start.split(sizes)]
        y = [t.clone().requires_grad_() for t in target.split(sizes)]
        optimizer = method(x, y, **RATES)
        for _ in range(6):
            optimizer.step(
                lambda x=x, y=y: (torch.cat(y) - target.flip(0)).square().sum() + 0.1 * torch.cat(x).pow(4).sum(),
                lambda x=x, y=y: (torch.cat(x).exp() * torch.cat(y).square()).sum() + torch.cat(y).cosh().sum(),
            )
        ends.append(torch.cat([*x, *y]).detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-10, atol=1e-12)


class _FailsAt:
    """A closure that raises at its k-th call, over all closures that share the counter."""

    def __init__(self, closure: Callable[[], Tensor], counter: list[int], at: int) -> None:
        self.closure, self.counter, self.at = closure, counter, at

    def __call__(self) -> Tensor:
        self.counter[0] += 1
        if self.counter[0] == self.at:
            raise KeyboardInterrupt
        return self.closure()


@every_method
@pytest.mark.parametrize("hvp", ["autograd", "finite_difference"])
def test_an_exception_leaves_parameters_and_state_as_they_were(method: Any, hvp: str) -> None:
    problem = Cleaning()
    optimizer = problem.optimizer(method, hvp=hvp, terms=2)
    optimizer.step(problem.upper, problem.lower)
    before, state = problem.parameters(), copy.deepcopy(optimizer.state_dict())
    failures = 0
    for at in range(1, 100):
        counter = [0]
        try:
            optimizer.step(_FailsAt(problem.upper, counter, at), _FailsAt(problem.lower, counter, at))
        except KeyboardInterrupt:
            failures += 1
            _assert_equal(problem.parameters(), before)
            _assert_same_state(optimizer.state_dict(), state)
        else:
            break
    assert failures >= 2
    with pytest.raises(KeyboardInterrupt):
        optimizer.warm_start(_FailsAt(problem.lower, [0], 3), 5)


def _assert_same_state(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a:
            _assert_same_state(a[k], b[k])
    elif isinstance(a, list):
        for s, t in zip(a, b, strict=True):
            _assert_same_state(s, t)
    else:
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_not_a_number_is_refused() -> None:
    problem = Cleaning()
    optimizer = problem.optimizer(MASOBA)
    before = problem.parameters()
    with pytest.raises(NonFiniteError, match="the step holds NaN or infinity; the parameters are as they were"):
        optimizer.step(lambda: problem.upper() * torch.nan, problem.lower)
    with pytest.raises(NonFiniteError, match="after warm_start"):
        optimizer.warm_start(lambda: problem.lower() * torch.inf, 2)
    _assert_equal(problem.parameters(), before)


@every_method
@pytest.mark.parametrize("extra", [{}, {"scale": 0.05}])
def test_resumed_training_is_bit_equal(method: Any, extra: dict[str, Any]) -> None:
    torch.manual_seed(0)
    problem = Cleaning()
    optimizer = problem.optimizer(method, **extra)
    for _ in range(3):
        optimizer.step(problem.upper, problem.lower)
    file = io.BytesIO()
    torch.save({"opt": optimizer.state_dict(), "net": problem.net.state_dict(), "x": problem.weights.detach()}, file)
    random = torch.get_rng_state()
    for _ in range(3):
        optimizer.step(problem.upper, problem.lower)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = Cleaning()
    resumed.net.load_state_dict(saved["net"])
    with torch.no_grad():
        resumed.weights.copy_(saved["x"])
    again = resumed.optimizer(method, **extra)
    again.load_state_dict(saved["opt"])
    torch.set_rng_state(random)
    for _ in range(3):
        again.step(resumed.upper, resumed.lower)
    _assert_equal(resumed.parameters(), problem.parameters())
    _assert_same_state(again.state_dict(), optimizer.state_dict())


def test_optimizers_that_share_a_state_dict_do_not_share_their_state() -> None:
    problem, other = Cleaning(), Cleaning()
    optimizer, twin = problem.optimizer(AccBO), other.optimizer(AccBO)
    optimizer.step(problem.upper, problem.lower)
    saved = optimizer.state_dict()
    twin.load_state_dict(saved)
    for _ in range(2):
        optimizer.step(problem.upper, problem.lower)
    assert twin.state["progress"]["steps"] == saved["state"]["progress"]["steps"] == 1
    assert optimizer.state["progress"]["steps"] == 3


@every_method
def test_copies_know_their_settings(method: Any) -> None:
    problem = Cleaning()
    optimizer = problem.optimizer(method, scale=0.05)
    optimizer.step(problem.upper, problem.lower)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        _assert_same_state(twin.state_dict(), optimizer.state_dict())
        assert twin._options == optimizer._options
        twin.add_param_group({"params": [torch.ones(2, requires_grad=True)], "level": "lower"})


def test_parameter_groups_and_schedules() -> None:
    a, b = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    y, w = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer = MASOBA(
        [{"params": a, "lr": 0.5}, {"params": [b]}],
        ({"params": p, "lr": lr} for p, lr in ((y, 0.25), (w, 0.125))),
        lr_upper=0.1,
        lr_lower=0.2,
    )
    assert [g["level"] for g in optimizer.param_groups] == ["upper", "upper", "lower", "lower"]
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.1, 0.25, 0.125]
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)

    def upper() -> Tensor:
        return y.sum() + w.sum() + a.sum() + b.sum()

    def lower() -> Tensor:
        return y.square().sum() + w.square().sum()

    optimizer.step(upper, lower)
    for p, expected in ((a, 0.5), (b, 0.9), (y, 0.5), (w, 0.75)):
        torch.testing.assert_close(p.detach(), torch.full_like(p, expected))
    schedule.step()
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.05, 0.01, 0.025, 0.0125])


def test_a_parameter_that_joins_or_is_frozen() -> None:
    x, y, late = (torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    optimizer = AccBO([x], [y], **RATES)

    def lower() -> Tensor:
        return (y - x).square().sum() + (late - x).square().sum()

    def upper() -> Tensor:
        return y.square().sum() + late.square().sum()

    optimizer.step(upper, lower)
    optimizer.add_param_group({"params": [late], "level": "lower"})
    for _ in range(2):
        optimizer.step(upper, lower)
    assert not torch.equal(late, torch.ones(2, dtype=torch.float64))
    frozen = late.detach().clone()
    late.requires_grad_(False)
    optimizer.step(upper, lower)
    assert torch.equal(late, frozen)
    x.requires_grad_(False)
    with pytest.raises(ArgumentError, match="none of the upper_params requires grad"):
        optimizer.step(upper, lower)


def test_detached_losses_raise() -> None:
    problem = Cleaning()
    for method in METHODS:
        optimizer = problem.optimizer(method)
        before = problem.parameters()
        for upper, lower, message in [
            (lambda: problem.upper().detach(), problem.lower, "upper_closure returned has no autograd graph"),
            (problem.upper, lambda: problem.lower().detach(), "lower_closure returned has no autograd graph"),
            (lambda: problem.weights.sum(), problem.lower, "upper_closure returned does not depend on lower_params"),
            (lambda: problem.net(problem.z).square().sum(), _without_x(problem), "neither loss depends on upper"),
        ]:
            with pytest.raises(NoGradientError, match=message):
                optimizer.step(upper, lower)
            _assert_equal(problem.parameters(), before)


def _without_x(problem: Cleaning) -> Callable[[], Tensor]:
    return lambda: nn.functional.cross_entropy(problem.net(problem.z), problem.labels)


def test_a_grad_scaler_is_refused() -> None:
    problem = Cleaning(torch.float32)
    optimizer = problem.optimizer(AccBO)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    before = problem.parameters()
    for _ in range(2):  # it does not get stuck
        with pytest.raises(GradScalerError, match="AccBO cannot be stepped through a GradScaler"):
            scaler.step(optimizer, problem.upper, problem.lower)
    _assert_equal(problem.parameters(), before)
    optimizer.step(problem.upper, problem.lower)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        optimizer.step(problem.upper, problem.lower)


def test_closures_are_checked() -> None:
    problem = Cleaning()
    optimizer = problem.optimizer(AccBO)
    with pytest.raises(ArgumentTypeError, match="step needs lower_closure"):
        optimizer.step(problem.upper)
    with pytest.raises(ArgumentTypeError, match="step needs upper_closure"):
        optimizer.step(lower_closure=problem.lower)
    value = optimizer.step(closure=problem.upper, lower_closure=problem.lower)
    assert value.shape == ()
    assert not value.requires_grad


def test_constructors_check_their_arguments() -> None:
    def parameter() -> Tensor:
        return torch.ones(2, requires_grad=True)

    x, y = parameter(), parameter()
    for options, message in [
        ({"lr_upper": 0.0}, "lr_upper must be positive"),
        ({"lr_lower": -1.0}, "lr_lower must be positive"),
        ({"beta": 1.5}, r"beta must lie in \[0, 1\]"),
        ({"gamma": -0.1}, r"gamma must lie in \[0, 1\]"),
        ({"tau": 2}, r"tau must lie in \[0, 1\]"),
        ({"solver": "lu"}, "solver must be one of 'neumann', 'linear', 'cg'"),
        ({"estimator": "sgd"}, "estimator must be one of 'storm', 'ema'"),
        ({"hvp": "jvp"}, "hvp must be one of"),
        ({"terms": 0}, "terms must be at least 1"),
        ({"scale": -1.0}, "scale must be positive and finite; got -1.0. It is at most 1/L"),
        ({"lower_steps": 0}, "lower_steps must be at least 1"),
        ({"lower_every": 0}, "lower_every must be at least 1"),
        ({"eps": 0.0}, "eps must be positive"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            AccBO([x], [y], **{**RATES, **options})
    with pytest.raises(ArgumentTypeError, match=r"beta must be a number in \[0, 1\]"):
        AccBO([x], [y], **RATES, beta="much")
    with pytest.raises(ArgumentTypeError, match=r"Write \[upper_params\]"):
        MASOBA(x, [y], **RATES)
    with pytest.raises(ArgumentTypeError, match="lower_params must be an iterable of tensors; got int"):
        MASOBA([x], 3, **RATES)
    with pytest.raises(ArgumentError, match="used up by an earlier call"):
        MASOBA([x], (p for p in []), **RATES)
    with pytest.raises(ArgumentError, match="A parameter belongs to one level"):
        MASOBA([x], [y, x], **RATES)
    with pytest.raises(ArgumentError, match="needs the key 'params'"):
        MASOBA([{"lr": 0.1}], [y], **RATES)
    with pytest.raises(ArgumentTypeError, match="upper_params must be real floating-point tensors"):
        MASOBA([torch.ones(2, dtype=torch.complex64, requires_grad=True)], [y], **RATES)
    with pytest.raises(ArgumentError, match="level must be one of 'upper', 'lower'"):
        MASOBA([x], [y], **RATES).add_param_group({"params": [parameter()]})
    assert issubclass(GradScalerError, NewtonPluginError)


def test_zero_hypergradients_do_not_move_x() -> None:
    x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = AccBO([x], [y], **RATES)
    optimizer.step(lambda: 0.0 * (y * x).sum(), lambda: (y - x).square().sum())
    assert torch.equal(x, torch.ones(2))
