"""Outputs that are not where they were said to be, or that somebody else has a hand on."""

from __future__ import annotations

import torch
from tests.core.fault import FISHER, HESSIAN, HOOKED, KEPT, NOTHING, Fault, Seen
from tests.core.provocations import (
    GOOD,
    LATER,
    Beside,
    HookedHead,
    Retained,
    Sometimes,
    Watched,
    Weights,
    spoiled,
    square,
)

import newton_plugin as npl

BOUNDARIES = (
    Fault(
        "a boundary that never fires",
        "boundary names a layer that is not called",
        Seen(npl.NoBoundaryError, "nothing recorded: the named part was not called since the last step"),
        ("no gradient",),
        options={"boundary": "spare"},
        doors=HOOKED,
    ),
    Fault(
        "a boundary that does not exist",
        "boundary='hed'",
        Seen(npl.ArgumentError, "names neither a submodule nor a method of"),
        ("no gradient",),
        options={"boundary": "hed"},
        doors=HOOKED,
    ),
    Fault(
        "a loss that ignores the boundary",
        "the named layer is called, the loss uses another",
        Seen(npl.NoBoundaryError, "none of which the loss was computed from"),
        ("no gradient",),
        options={"boundary": "head"},
        model=Beside,
        doors=HOOKED,
    ),
    Fault(
        "the same, at a later step",
        "the named layer is left out for one batch",
        KEPT,
        ("plain gradient", "later steps"),
        square,
        (GOOD, spoiled(1000.0), LATER),
        {"boundary": "head"},
        Sometimes,
        HOOKED,
    ),
    Fault(
        "a wrapped loss that ignores its outputs",
        "it uses another tensor instead",
        Seen(npl.NoBoundaryError, "does not depend on outputs='0'"),
        ("no gradient",),
        lambda y, t: torch.ones(3, requires_grad=True).square().sum(),
        doors=("newton_loss",),
    ),
    Fault(
        "no outputs at all",
        "a loss of parameters alone",
        Seen(npl.NoBoundaryError, "found no outputs under the loss"),
        ("no gradient",),
        lambda y, t: y.square(),
        model=Weights,
        doors=HOOKED,
    ),
    Fault(
        "a loss without reduction",
        "one number for each sample",
        Seen(npl.ShapeError, "loss must be one number; got shape (6,). Reduce it first"),
        ("no gradient",),
        lambda y, t: (y - t).square().sum(-1),
        doors=("LossHook",),
    ),
    Fault(
        "a user's own hook on the outputs that looks",
        "y.register_hook(print)",
        NOTHING,
        ("definition", "hook sees the step"),
        options=FISHER,
        model=lambda: Watched(1.0),
    ),
    Fault(
        "a user's own hook on the outputs that changes the gradient",
        "y.register_hook(lambda g: 3 * g)",
        NOTHING,
        ("tripled", "hook sees the step"),
        options=FISHER,
        model=lambda: Watched(3.0),
    ),
    Fault(
        "the same, curvature='hessian'",
        "y.register_hook(lambda g: 3 * g)",
        Seen(message="a hook on the outputs changes their gradient", warns=True, fallbacks=2),
        ("fisher",),
        batches=(GOOD, LATER),
        options=HESSIAN,
        model=lambda: Watched(3.0),
        doors=HOOKED,
    ),
    Fault(
        "the same with a wrapped loss",
        "y.register_hook(lambda g: 3 * g)",
        NOTHING,
        ("tripled", "hook sees the step"),
        options=HESSIAN,
        model=lambda: Watched(3.0),
        doors=("newton_loss",),
    ),
    Fault(
        "the outputs' gradient is retained",
        "y.retain_grad()",
        NOTHING,
        ("definition", "retained"),
        options=FISHER,
        model=Retained,
        known_issues=dict.fromkeys(
            HOOKED, "y.grad holds the gradients of the package's own pass as well; use y.register_hook"
        ),
    ),
    Fault(
        "a module's backward hook on the head",
        "head.register_full_backward_pre_hook, which triples the gradient",
        NOTHING,
        ("tripled", "one call"),
        options=FISHER,
        model=lambda: HookedHead(3.0),
    ),
)
