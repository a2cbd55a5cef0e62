"""What the package itself does with a loss: asked, not guessed."""

from __future__ import annotations

import warnings
from typing import Literal

from newton_plugin._closed_form import closed_form_hvp
from newton_plugin._loss import NewtonLoss
from newton_plugin.testing._subject import Subject

__all__ = ["Taken", "has_closed_form", "taken_by"]

Taken = Literal["hessian", "fisher", "error"]


def taken_by(subject: Subject, curvature: Literal["hessian", "auto"]) -> Taken:
    """Which curvature one step with ``newton_loss(loss, curvature=curvature)`` was taken with."""
    wrapped = NewtonLoss(
        subject.call,
        curvature=curvature,
        damping=1.0,
        reduction=subject.reduction,
        feature_dims=subject.layout.feature_dims,
        sync=False,  # it may be called on one process of several
    )
    outputs = subject.outputs.clone().requires_grad_().clone()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            wrapped(outputs)
        except Exception:
            return "error"
    return "fisher" if any("uses the empirical Fisher" in str(w.message) for w in caught) else "hessian"


def has_closed_form(subject: Subject) -> bool:
    """Whether the package knows this loss's Hessian by a formula, and needs no products."""
    call = (subject.outputs, *subject.args)
    return (
        closed_form_hvp(subject.loss_fn, subject.outputs, call, subject.kwargs, subject.layout, subject.reduction)
        is not None
    )
