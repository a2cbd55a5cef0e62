"""Half precision takes its step in the ordinary backward pass, as exactly as a pass of its own, without wide copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.step.counted import Counted
from tests.twins import gradients_and_hessians, live_samples, step
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import newton_plugin as npl
from newton_plugin._linalg import large_rows

HALF = [torch.bfloat16, torch.float16]
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

Loss = Callable[[Tensor, Tensor], Tensor]

LOSSES: dict[str, Loss] = {
    "in half": lambda y, t: F.cross_entropy(y, t),
    "in float32": lambda y, t: F.cross_entropy(y.float(), t),
    "two uses": lambda y, t: F.cross_entropy(y, t) + 0.1 * y.square().sum(-1).mean(),
    "one use of two in float32": lambda y, t: F.cross_entropy(y.float(), t) + 0.1 * y.square().sum(-1).mean(),
    "squares": lambda y, t: (y - F.one_hot(t, y.shape[-1]).to(y)).square().sum(-1).mean(),
}
# Curvature, structure, damping; the last column is what the twin is told.
RULES: dict[str, tuple[dict[str, Any], tuple[str, str, float]]] = {
    "mean": ({"structure": "mean", "damping": 0.1}, ("fisher", "mean", 0.1)),
    "isotropic": ({"structure": "isotropic", "damping": 0.1}, ("fisher", "isotropic", 0.1)),
    "per_sample": ({"structure": "per_sample", "damping": 0.1}, ("fisher", "per_sample", 0.1)),
    "norm": ({"curvature": "norm"}, ("norm", "mean", 0.0)),
    "hessian": ({"curvature": "hessian", "damping": 0.1}, ("hessian", "mean", 0.1)),
}


def sent(y: Tensor, t: Tensor, loss: Loss, scale: float, **options: Any) -> Tensor:
    """What one backward pass sends to the outputs; as in a network, they are no leaf."""
    leaf = y.clone().requires_grad_()
    (npl.newton_loss(loss, **options)(leaf * 1, t) * scale).backward()
    assert leaf.grad is not None
    return leaf.grad


def case(n: int, m: int, dtype: torch.dtype, seed: int = 0, ignored: bool = True) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    y, t = torch.randn(n, m, generator=g).to(dtype), torch.randint(m, (n,), generator=g)
    if ignored and n > 2:
        t[1] = -100
    return y, t


def error(ours: Tensor, theirs: Tensor) -> float:
    """Over all entries, but for the part of it that is an underflow of what is sent."""
    least = torch.finfo(ours.dtype).smallest_normal * torch.finfo(ours.dtype).eps
    beyond = ((ours.double() - theirs).abs() - least).clamp_min(0)
    return float(beyond.norm() / theirs.norm())


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(HALF),
    n=st.sampled_from([1, 2, 3, 7, 40, 4096]),
    power=st.integers(-20, 15),
    rule=st.sampled_from(list(RULES)),
    loss=st.sampled_from(["in half", "in float32"]),
    wide=st.booleans(),
    seed=st.integers(0, 9),
)
def test_it_is_the_step_of_float64(
    dtype: torch.dtype, n: int, power: int, rule: str, loss: str, wide: bool, seed: int
) -> None:
    """Against the definitions, from the same numbers; also where rows are large and stay in their own format."""
    y, t = case(n, 3, dtype, seed)
    options, told = RULES[rule]
    if n > 100:  # the dense Hessian of the twin is N m x N m
        p = y.double().softmax(-1)
        live = (t >= 0).sum()
        g = (p - F.one_hot(t.clamp_min(0), 3)) * (t >= 0).unsqueeze(-1)
        h = (torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)) * (t >= 0)[:, None, None]
    else:
        g, h = gradients_and_hessians(lambda v: F.cross_entropy(v, t), y.double())
        live = live_samples(g)
    theirs = step(g, h, told[0], told[1], 1, told[2], int(live)) * (2.0**power / int(live))
    if dtype == torch.float16 and float(theirs.abs().max()) > 6e4:
        return  # not to be sent in float16
    before = large_rows._LARGE
    large_rows._LARGE = 1 if wide else before
    try:
        ours = sent(y, t, LOSSES[loss], 2.0**power, **options)
    finally:
        large_rows._LARGE = before
    assert ours.dtype == dtype
    # A loss in half precision has rounded its probabilities, and the Hessian is made of them.
    assert error(ours, theirs) <= (20 if rule == "hessian" else 4) * ROUNDING[dtype]


@pytest.mark.parametrize("options", [{}, *(o for o, _ in RULES.values()), {"structure": "diagonal", "damping": 0.1}])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("n", [5, 1000])
def test_it_is_as_exact_as_a_pass_of_its_own(
    loss: str, dtype: torch.dtype, options: dict[str, Any], n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``on_nonfinite="raise"`` makes the step at once. The truth is the step in float64."""
    if options.get("curvature") == "hessian" and loss in ("two uses", "one use of two in float32", "squares"):
        pytest.skip("products need a pass of their own")
    y, t = case(n, 6, dtype, ignored=loss in ("in half", "in float32"))
    for scale in (1.0, 2.0**-6):
        theirs = sent(y.double(), t, lambda v, u: LOSSES[loss](v, u), scale, **options)
        at_once = error(sent(y, t, LOSSES[loss], scale, on_nonfinite="raise", **options), theirs)
        for large in (large_rows._LARGE, 1):
            with monkeypatch.context() as patch:
                patch.setattr(large_rows, "_LARGE", large)
                ours = error(sent(y, t, LOSSES[loss], scale, **options), theirs)
            luck = 1.0 if n < 10 else 0.1  # of a few roundings
            assert ours <= 1.1 * at_once + luck * ROUNDING[dtype]


def counted(y: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(Counted.apply(y), t)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    ("options", "passes"), [({}, 1), ({"curvature": "norm"}, 1), ({"damping": 0.1}, 1), ({"on_nonfinite": "raise"}, 2)]
)
def test_the_loss_is_differentiated_once(dtype: torch.dtype, options: dict[str, Any], passes: int) -> None:
    Counted.passes = 0
    sent(*case(6, 4, dtype), counted, 1.0, **options)
    assert Counted.passes == passes


@pytest.mark.parametrize(("dtype", "passes"), [(torch.bfloat16, 1), (torch.float16, 2)])
def test_float16_with_terms_beside_has_a_pass_of_its_own(dtype: torch.dtype, passes: int) -> None:
    """They need the loss's own gradient in its own scale, and the outputs one that does not underflow."""
    y, t = case(6, 4, dtype)
    leaf, other = y.clone().requires_grad_(), torch.ones(3, dtype=dtype, requires_grad=True)
    hook = npl.LossHook(damping=0.1)
    for _ in range(7):  # at the seventh step nobody looks for other users of the loss
        Counted.passes, other.grad = 0, None
        hook(counted(leaf @ torch.eye(4, dtype=dtype), t) + other.sum() / 4).backward()
    assert Counted.passes == passes
    assert other.grad is not None
    assert other.grad.tolist() == [0.25] * 3


def test_a_mean_in_float16_does_not_underflow_without_a_scaler() -> None:
    """The gradient of a mean over 4,096 samples is at most 1e-7 here: a bit or two in float16."""
    y, t = case(4096, 6, torch.float16)

    def flat(v: Tensor, u: Tensor) -> Tensor:
        return 2.0**-10 * F.cross_entropy(v, u)

    plain = y.clone().requires_grad_()
    flat(plain, t).backward()
    theirs = sent(y.double(), t, flat, 2.0**10)
    assert plain.grad is not None
    exact = y.double().requires_grad_()
    flat(exact, t).backward()
    assert exact.grad is not None
    assert float((plain.grad.double() - exact.grad).norm() / exact.grad.norm()) > 0.05
    assert error(sent(y, t, flat, 2.0**10), theirs) <= 4 * ROUNDING[torch.float16]


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_rows_whose_gradients_are_below_the_format_stay_samples_of_a_float32_loss(dtype: torch.dtype) -> None:
    """Half of the samples are all but certain: in float16 their gradients are zero, and they are not ignored."""
    y = torch.tensor([[40.0, 0.0, 0.0], [1.0, 0.5, 0.0]] * 8, dtype=dtype)
    t = torch.zeros(16, dtype=torch.long)
    theirs = sent(y.double(), t, LOSSES["in float32"], 1.0)
    assert error(sent(y, t, LOSSES["in float32"], 1.0), theirs) <= 4 * ROUNDING[dtype]


@pytest.mark.parametrize("large", [1, large_rows._LARGE])
def test_what_is_sent_overflows_only_where_its_product_with_the_scale_does(
    large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of some 1e6 and more, beyond float16, under a scale of 2^-10; gradients of 1e2 under one of 2^15."""
    monkeypatch.setattr(large_rows, "_LARGE", large)
    y, t = case(8, 4, torch.float16)
    for factor, scale in ((1e-6, 2.0**-10), (100.0, 2.0**10)):

        def loss(v: Tensor, u: Tensor, f: float = factor) -> Tensor:
            return f * F.cross_entropy(v.float(), u)

        theirs = sent(y.double(), t, loss, scale)
        ours = sent(y, t, loss, scale)
        assert bool(torch.isfinite(ours).all())
        assert error(ours, theirs) <= 4 * ROUNDING[torch.float16]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("large", [1, large_rows._LARGE])
@pytest.mark.parametrize("options", [{}, {"curvature": "norm"}, {"structure": "diagonal"}], ids=str)
def test_a_batch_that_is_not_finite_goes_through_and_is_counted(
    dtype: torch.dtype, large: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(large_rows, "_LARGE", large)
    wrapped = npl.newton_loss(lambda v, w: (v * w).square().sum(-1).mean(), **options)
    for worst, fallbacks in ((1.0, 0), (torch.inf, 1), (1.0, 1)):
        y = torch.ones(4, 3, dtype=dtype, requires_grad=True)
        weights = torch.ones(4, 3, dtype=dtype)
        weights[2, 1] = worst
        wrapped(y * 1, weights).backward()
        assert y.grad is not None
        assert bool(torch.isfinite(y.grad).all()) == (worst == 1)
        assert wrapped.diagnostics()["fallbacks"] == fallbacks


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("large", [1, large_rows._LARGE])
@pytest.mark.parametrize("options", [o for o, _ in RULES.values() if "hessian" not in o.values()], ids=str)
def test_further_passes_and_what_is_logged(
    dtype: torch.dtype, large: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    y, t = case(40, 3, dtype)
    exact = npl.newton_loss(F.cross_entropy, **options)
    exact(y.double().requires_grad_() * 1, t).backward()
    monkeypatch.setattr(large_rows, "_LARGE", large)
    wrapped, leaf = npl.newton_loss(F.cross_entropy, **options), y.clone().requires_grad_()
    loss, found = wrapped(leaf * 1, t), []
    for scale in (4.0, 4.0, 1024.0):
        leaf.grad = None
        (loss * scale).backward(retain_graph=True)
        assert leaf.grad is not None
        found.append(leaf.grad)
    assert torch.equal(found[0], found[1])
    assert error(found[2], 256 * found[0].double()) <= ROUNDING[dtype]
    said = exact.diagnostics()
    for key, value in wrapped.diagnostics().items():
        if key != "eig_min":  # zero but for rounding
            assert value == pytest.approx(said[key], rel=0.02), key


class Wide(TorchDispatchMode):
    """Notes the largest number of bytes of any tensor that is made, as multiples of those of the outputs."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs, self.made = outputs, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.made = max(self.made, result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("options", [{}, {"curvature": "norm"}, {"structure": "per_sample"}], ids=str)
@pytest.mark.parametrize("shape", [(600, 1000), (2, 600_000)], ids=str)
def test_large_outputs_are_never_copied_in_a_wider_format(
    dtype: torch.dtype, options: dict[str, Any], shape: tuple[int, int]
) -> None:
    y = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    wrapped, outputs = npl.newton_loss(lambda v: v.square().sum(-1).mean(), **options), y * 1
    with Wide(outputs.nbytes) as wide:
        wrapped(outputs).backward()
    assert wide.made <= max(outputs.nbytes, 8 * large_rows._PART_ELEMENTS)


def test_the_step_itself_is_not_kept_where_its_size_is_known() -> None:
    hook = npl.LossHook()
    y = torch.randn(600, 1000, requires_grad=True)
    hook(y.square().sum(-1).mean()).backward()
    (rule,) = hook._states.rules.values()
    assert rule.last is not None
    assert rule.last.step.shape == (600, 0)
    assert rule.last_gradient is None
    assert y.grad is not None
    steps = y.grad * 600
    assert hook.diagnostics()["step_norm"] == pytest.approx(float(steps.square().sum(-1).mean().sqrt()), rel=1e-6)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_network_in_half_trains_as_in_float64(dtype: torch.dtype) -> None:
    """Ten steps, also those at which somebody looks for other users of the loss; accumulated over two batches."""
    x, t = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
    found = []
    for form in (dtype, torch.float64):
        torch.manual_seed(0)
        net, hook = nn.Linear(5, 3).to(form), npl.LossHook()
        with torch.no_grad():
            net.weight.copy_(net.weight.to(dtype))
            net.bias.copy_(net.bias.to(dtype))
        for _ in range(10):
            net.zero_grad()
            for part in (slice(0, 6), slice(6, 12)):
                (hook(F.cross_entropy(net(x[part].to(dtype).to(form)), t[part])) / 2).backward()
        assert net.weight.grad is not None
        found.append(net.weight.grad.double())
    assert float((found[0] - found[1]).norm() / found[1].norm()) <= 8 * ROUNDING[dtype]


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("large", [1, large_rows._LARGE])
@pytest.mark.parametrize("options", [{}, *(o for o, _ in RULES.values())], ids=str)
@pytest.mark.parametrize("loss", ["in half", "in float32"])
def test_a_loss_times_zero_sends_zero_and_a_further_pass_its_step(
    dtype: torch.dtype, large: int, options: dict[str, Any], loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight of zero in a warm-up, or a loss switched off: plain training sends 0, and so does a step."""
    monkeypatch.setattr(large_rows, "_LARGE", large)
    y, t = case(6, 4, dtype)
    theirs = sent(y.double(), t, LOSSES[loss], 1.0, **options)
    leaf = y.clone().requires_grad_()
    value = npl.newton_loss(LOSSES[loss], **options)(leaf * 1, t)
    (0 * value).backward(retain_graph=True)
    assert leaf.grad is not None
    assert not leaf.grad.any()
    leaf.grad = None
    value.backward()
    if options.get("curvature") == "hessian" and dtype != torch.float16:
        return  # a further pass after one of nothing has no second derivatives: NaN
    assert leaf.grad is not None
    assert error(leaf.grad, theirs) <= 20 * ROUNDING.get(dtype, 2.0**-20)
