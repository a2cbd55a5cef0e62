"""``compile_step=True`` takes the same steps: traced alone here, in machine code in the slow stage."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import newton_plugin as npl
from newton_plugin._step import compiled

# Its compiler does not follow the rules: steps are eager there, with the warning.
compiles = pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="the compiler of torch 2.6 gives up")

RULES: dict[str, dict[str, Any]] = {
    "default": {},
    "norm": {"curvature": "norm"},
    "mean": {"structure": "mean"},
    "fixed": {"damping": 0.1},
    "per_sample": {"structure": "per_sample"},
    "diagonal": {"structure": "diagonal"},
    "root": {"power": 0.5},
    "sum": {"reduction": "sum"},
    "instance": {"damping": npl.AutoDamping(ratio=0.5)},
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    compiled._STEPS.clear()
    yield
    torch._dynamo.reset()
    compiled._STEPS.clear()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace, and make no machine code."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


def loss_of(net: nn.Module, n: int, seed: int, reduction: str = "mean") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x, t = torch.randn(n, 5, generator=generator), torch.randint(0, 4, (n,), generator=generator)
    return F.cross_entropy(net(x), t, reduction=reduction)


def gradient(
    net: nn.Linear, hook: npl.LossHook, n: int, seed: int, reduction: str = "mean", scale: float = 1
) -> Tensor:
    net.zero_grad()
    (hook(loss_of(net, n, seed, reduction)) * scale).backward()
    assert net.weight.grad is not None
    return net.weight.grad.clone()


def same(options: dict[str, Any], sizes: tuple[int, ...], tolerance: float) -> None:
    """Steps of growing and shrinking batches, eager and compiled; then states and diagnostics."""
    torch.manual_seed(0)
    net = nn.Linear(5, 4)
    hooks = [npl.LossHook(**options), npl.LossHook(**options, compile_step=True)]
    for seed, n in enumerate(sizes):
        eager, ours = (gradient(net, hook, n, seed, options.get("reduction", "mean"), 2.0) for hook in hooks)
        torch.testing.assert_close(ours, eager, rtol=tolerance, atol=0)
    assert compiled._STEPS, "nothing was compiled"
    shown, ours_shown = (hook.diagnostics() for hook in hooks)
    assert ours_shown == pytest.approx(shown, rel=1e-5, abs=1e-12)
    resumed = npl.LossHook(**options)
    resumed.load_state_dict(hooks[1].state_dict())
    for hook in (resumed, copy.deepcopy(hooks[1]), pickle.loads(pickle.dumps(hooks[1]))):
        wanted = gradient(net, copy.deepcopy(hooks[0]), 9, 99, options.get("reduction", "mean"))
        torch.testing.assert_close(
            gradient(net, hook, 9, 99, options.get("reduction", "mean")), wanted, rtol=tolerance, atol=0
        )


@compiles
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("options", RULES.values(), ids=RULES)
def test_the_same_steps(options: dict[str, Any]) -> None:
    same(options, (12, 12, 7, 30, 12), 0)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("rule", ["default", "norm", "mean"])
def test_the_same_steps_in_machine_code(rule: str) -> None:
    same(RULES[rule], (12, 12, 7, 30, 12), 1e-6)


class Counting(npl.Damping):
    """A memory that nobody is told of."""

    def __init__(self) -> None:
        self.steps = 0

    def value(self, scale: Tensor) -> Tensor:
        self.steps += 1
        return scale / self.steps


class Averaging(npl.Damping):
    """A state that begins empty."""

    def __init__(self) -> None:
        self.last: Tensor | None = None

    def value(self, scale: Tensor) -> Tensor:
        self.last = scale if self.last is None else (self.last + scale) / 2
        return self.last

    def state_dict(self) -> dict[str, Any]:
        return {} if self.last is None else {"last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last = state.get("last")


class Told(Averaging):
    """The same, which says how its state begins."""

    def value(self, scale: Tensor) -> Tensor:
        assert self.last is not None
        self.last = torch.where(self.last == 0, scale, (self.last + scale) / 2)
        return self.last

    def initial_state(self, like: Tensor) -> dict[str, Any]:
        return {"last": like.new_zeros(())}


class Misled(Averaging):
    """Says it, and has another form after a step."""

    def value(self, scale: Tensor) -> Tensor:
        return super().value(scale)

    def initial_state(self, like: Tensor) -> dict[str, Any]:
        return {}


class Half(npl.Damping):
    def value(self, scale: Tensor) -> Tensor:
        return scale / 2


@compiles
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("options", "is_compiled"),
    [
        ({"damping": Half()}, True),
        ({"damping": Told()}, True),
        ({"damping": Counting()}, False),
        ({"damping": Averaging()}, False),
        ({"curvature": npl.EmpiricalFisher("mean", refresh_every=3)}, False),
        ({"curvature": npl.EmpiricalFisher("isotropic", refresh_every=3)}, False),
    ],
    ids=["no attributes", "says its state", "attributes", "a state", "kept C", "kept number"],
)
def test_rules_whose_state_nobody_knows_before_the_first_step_stay_eager(
    options: dict[str, Any], is_compiled: bool
) -> None:
    torch.manual_seed(0)
    net, hook = nn.Linear(5, 4), npl.LossHook(**options, compile_step=True)
    if isinstance(options.get("damping"), Told):  # the eager twin has no initial_state()
        options = {"damping": Averaging()}
    eager = npl.LossHook(**options)
    for seed in range(5):
        assert torch.equal(gradient(net, hook, 12, seed), gradient(net, eager, 12, seed))
    (step,) = compiled._STEPS.values()
    assert bool(step._functions) == is_compiled


@compiles
@pytest.mark.usefixtures("quick")
def test_a_state_that_grows_against_its_word_is_told_once() -> None:
    torch.manual_seed(0)
    net = nn.Linear(5, 4)
    hook, eager = (npl.LossHook(damping=Misled(), compile_step=c) for c in (True, False))
    with pytest.warns(UserWarning, match="another form than initial_state"):
        first = gradient(net, hook, 12, 0)
    assert torch.equal(first, gradient(net, eager, 12, 0))
    for seed in (1, 2):  # a further warning would be an error
        assert torch.equal(gradient(net, hook, 12, seed), gradient(net, eager, 12, seed))


@compiles
@pytest.mark.usefixtures("quick")
def test_the_last_batch_is_not_kept_where_it_is_large() -> None:
    hook = npl.LossHook(compile_step=True)
    y = torch.randn(8, 2**16, requires_grad=True)
    hook((y * 1.0).square().sum(-1).mean()).backward()
    (rule,) = hook._used
    assert rule.last is not None
    assert rule.last.step.numel() == 0


@compiles
@pytest.mark.usefixtures("quick")
def test_two_compilations_serve_all_batch_sizes() -> None:
    torch.manual_seed(0)
    net, hook = nn.Linear(5, 4), npl.LossHook(compile_step=True)
    torch._dynamo.utils.counters.clear()
    for seed, n in enumerate((12, 7, 30, 9, 12, 50, 3, 2)):
        gradient(net, hook, n, seed)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@compiles
@pytest.mark.usefixtures("quick")
def test_a_gradient_that_is_not_finite_stays() -> None:
    hook, net = npl.LossHook(compile_step=True), nn.Linear(5, 4)
    gradient(net, hook, 12, 0)
    y = torch.tensor([[1.0, 0.0], [2.0, 3.0]], requires_grad=True)
    hook = npl.LossHook(compile_step=True)
    hook(nn.Linear(2, 2)(y).sqrt().sum(-1).mean() * float("inf")).backward()
    assert not torch.isfinite(y.grad).all()
    assert hook.diagnostics()["fallbacks"] == 1


def test_without_a_compiler_steps_are_eager_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no C++ compiler\nwith more lines")

    monkeypatch.setattr(torch, "compile", no_compiler)
    torch.manual_seed(0)
    net = nn.Linear(5, 4)
    eager, hook = npl.LossHook(), npl.LossHook(compile_step=True)
    with pytest.warns(UserWarning, match=r"cannot compile the step here \(RuntimeError: no C\+\+ compiler\)") as told:
        steps = [gradient(net, hook, n, n) for n in (12, 7, 12)]
    assert len(told) == 1
    for n, step in zip((12, 7, 12), steps, strict=True):
        assert torch.equal(step, gradient(net, eager, n, n))


def test_what_is_not_compiled_is_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hessians, half precision and single rows; several boundaries, whose steps are made before the backward pass."""
    monkeypatch.setattr(torch, "compile", None)  # nobody may ask for it
    torch.manual_seed(0)
    net = nn.Linear(5, 4)
    for options, n in (({"curvature": "hessian"}, 12), ({}, 1)):
        hook = npl.LossHook(**options, compile_step=True)
        assert torch.equal(gradient(net, hook, n, 0), gradient(net, npl.LossHook(**options), n, 0))


def test_the_argument_is_checked() -> None:
    with pytest.raises(npl.ArgumentTypeError, match="compile_step must be True or False; got 1"):
        npl.LossHook(compile_step=1)  # type: ignore[arg-type]
