"""What the package itself does with a loss, found out by letting it do so."""

from __future__ import annotations

import warnings
from typing import Literal

from newton_plugin._boundary.autograd_graph import edge_of, explore, make_boundary
from newton_plugin._derivatives.closed_forms import find_closed_form
from newton_plugin._doors.newton_loss import NewtonLoss
from newton_plugin.testing._subject import Subject

__all__ = ["Taken", "has_closed_form", "taken_by"]

Taken = Literal["hessian", "fisher", "error"]


def taken_by(subject: Subject) -> Taken:
    """The curvature of one step with ``newton_loss(loss, curvature="hessian")``; "error" if the step raises."""
    wrapped = NewtonLoss(
        subject.call,
        curvature="hessian",
        damping=1.0,
        reduction=subject.reduction,
        feature_dims=subject.layout.feature_dims,
        sync=False,  # check_loss may be called on one process of several
    )
    outputs = subject.outputs.clone().requires_grad_().clone()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            wrapped(outputs).sum().backward()  # some steps are taken in the backward pass
        except Exception:
            return "error"
    return "fisher" if any("uses the empirical Fisher" in str(w.message) for w in caught) else "hessian"


def has_closed_form(subject: Subject) -> bool:
    """Whether the package knows the Hessian of this loss in closed form, and needs no products."""
    y = subject.outputs.clone().requires_grad_().clone()
    edge = edge_of(y)
    loss = subject.call(y)
    if loss.grad_fn is None:
        return False
    boundary = make_boundary("outputs", edge, explore(loss.grad_fn, edge.__eq__))
    return find_closed_form(loss.grad_fn, boundary, subject.layout) is not None
