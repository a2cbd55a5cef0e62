"""What stays as it was after a fault: for each promise its words and its test."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tests.faults.case import Fault
from tests.faults.doors import Outcome, flat_gradient, run
from tests.faults.provocations import HookedHead, Retained, Watched, made
from tests.twins import gradients_and_hessians, relative_error, step
from torch import Tensor, nn

__all__ = ["INTACT", "make"]


def make(fault: Fault) -> nn.Module:
    """The fault's model."""
    return made(fault.model)


def _same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13, equal_nan=True)


def _dense_step(fault: Fault, model: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, the gradients g_i and the steps of the first batch, by the definitions alone."""
    x, t = fault.batches[0]
    y = model(x)
    g, h = gradients_and_hessians(lambda v: fault.loss(v, t), y)
    return y, g, step(g, h, fault.options.get("curvature", "fisher"), "mean", 1, fault.options["damping"])


def plain_gradient(fault: Fault, door: str, outcome: Outcome) -> None:
    plain = run("plain", make(fault), fault.loss, fault.batches)
    which = len(fault.batches) // 2
    _same(outcome.gradients[which], plain.gradients[which])
    if which > 0:  # under a rule that changes a first step, the good batches do not keep theirs: the test can fail
        rule = {} if {"curvature", "damping"} & fault.options.keys() else {"structure": "isotropic"}
        other = run(door, make(fault), fault.loss, fault.batches, **fault.options, **rule)
        _same(other.gradients[which], plain.gradients[which])
        assert relative_error(other.gradients[0], plain.gradients[0]) > 1e-3


def later_steps(fault: Fault, door: str, outcome: Outcome) -> None:
    first, _, last = fault.batches
    without = run(door, make(fault), fault.loss, (first, last), **fault.options)
    assert torch.equal(outcome.gradients[-1], without.gradients[-1])
    assert bool(torch.isfinite(outcome.gradients[-1]).all())
    assert bool(outcome.gradients[-1].any())


def no_gradient(fault: Fault, door: str, outcome: Outcome) -> None:
    assert not outcome.gradients
    assert flat_gradient(outcome.model).numel() == 0
    assert all(torch.equal(a, b) for a, b in zip(outcome.model.parameters(), make(fault).parameters(), strict=True))
    assert not outcome.left_over


def fisher(fault: Fault, door: str, outcome: Outcome) -> None:
    options = {**fault.options, "curvature": "fisher"}
    expected = run(door, make(fault), fault.loss, fault.batches, **options)
    for ours, theirs in zip(outcome.gradients, expected.gradients, strict=True):
        assert relative_error(ours, theirs) <= 1e-12
        assert bool(theirs.any())


def definition(fault: Fault, door: str, outcome: Outcome) -> None:
    model = make(fault)
    y, _, steps = _dense_step(fault, model)
    y.backward(steps / len(steps))
    _same(outcome.gradients[0], flat_gradient(model))
    assert bool(outcome.gradients[0].any())


def descent(fault: Fault, door: str, outcome: Outcome) -> None:
    _, g, steps = _dense_step(fault, make(fault))
    assert bool(((g * steps).sum(-1) > 0).all())
    values = torch.linalg.eigvalsh(
        gradients_and_hessians(lambda v: fault.loss(v, fault.batches[0][1]), make(fault)(fault.batches[0][0]))[1].mean(
            0
        )
    )
    assert float(values.min()) < -0.1, "the case is indefinite"


def zero(fault: Fault, door: str, outcome: Outcome) -> None:
    assert not bool(outcome.gradients[len(fault.batches) // 2].any())
    assert outcome.gradients[len(fault.batches) // 2].numel() > 0


def tripled(fault: Fault, door: str, outcome: Outcome) -> None:
    model = make(fault)
    y, _, steps = _dense_step(fault, model)
    y.backward(steps / len(steps))  # through the hook, which triples it
    _same(outcome.gradients[0], flat_gradient(model))


def hook_sees_the_step(fault: Fault, door: str, outcome: Outcome) -> None:
    _, _, steps = _dense_step(fault, make(fault))
    assert isinstance(outcome.model, Watched)
    (in_backward,) = outcome.model.seen
    _same(in_backward, steps / len(steps))


def one_call(fault: Fault, door: str, outcome: Outcome) -> None:
    _, _, steps = _dense_step(fault, make(fault))
    assert isinstance(outcome.model, HookedHead)
    (seen,) = outcome.model.seen
    _same(seen, steps / len(steps))


def retained(fault: Fault, door: str, outcome: Outcome) -> None:
    _, _, steps = _dense_step(fault, make(fault))
    assert isinstance(outcome.model, Retained)
    assert outcome.model.outputs.grad is not None
    _same(outcome.model.outputs.grad, steps / len(steps))


INTACT: dict[str, tuple[str, Callable[[Fault, str, Outcome], None]]] = {
    "plain gradient": ("that batch's gradient is the plain one, unchanged", plain_gradient),
    "later steps": ("later steps are those of a run without that batch", later_steps),
    "no gradient": ("no parameter and no gradient is touched; the module is unwrapped", no_gradient),
    "fisher": ("every step is that of curvature='fisher'", fisher),
    "definition": ("the step is the one by definition", definition),
    "descent": ("no sample's step goes uphill", descent),
    "zero": ("that batch's gradients are zero, not NaN", zero),
    "tripled": ("the hook's change is applied once, to the step", tripled),
    "hook sees the step": ("the hook is called once, with the step", hook_sees_the_step),
    "one call": ("the hook is called once, with the step", one_call),
    "retained": ("y.grad is the step that enters the network", retained),
    "scaler": ("the optimizer's step is skipped, the scale halved, as without the plugin", lambda *_: None),
}
