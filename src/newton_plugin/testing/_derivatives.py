"""First and second derivatives of a loss by autograd, and whether they are right."""

from __future__ import annotations

import torch
from torch import Tensor

from newton_plugin.testing._differences import CannotMove, directions, gradient_error, hessian_error, is_flat, tolerance
from newton_plugin.testing._reasons import first_line, in_plain_words
from newton_plugin.testing._report import Finding, skipped
from newton_plugin.testing._subject import Subject

__all__ = ["Derivatives"]


class Derivatives:
    """The derivatives of one subject by autograd.

    Attributes:
        gradient: ``g_i`` in the shape of the outputs; None if there is none, or one that is not finite.
        probes: two random directions.
        products: the batch's Hessian times each of them; None if there is none, or one that is not finite.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.gradient: Tensor | None = None
        self.probes = directions(subject, 2)
        self.products: Tensor | None = None

    def find_gradient(self) -> Finding:
        """The gradient by backpropagation."""
        try:
            gradient = self.subject.gradient()
        except Exception as error:
            words, remedy = in_plain_words(error)
            return Finding("fails", "missing", words, remedy, first_line(error))
        rows = self.subject.layout.to_rows(gradient)
        bad = int((~torch.isfinite(rows)).any(-1).sum())
        if bad:
            words = f"NaN or infinite in {bad} of {len(rows)} samples, where the loss is finite"
            return Finding("fails", "non-finite", words, "look for sqrt or norm at 0, 0 * inf, torch.where over a NaN")
        self.gradient = gradient
        if not bool(gradient.any()):
            return Finding("note", "zero", "at these outputs, in every sample: there is nothing to learn from here")
        return Finding("ok", "exact")

    def compare_gradient(self, repeatable: bool) -> Finding:
        """The gradient against differences of the loss."""
        if not repeatable or self.gradient is None:
            return skipped("a second call gives another loss")
        try:
            error = gradient_error(self.subject, self.gradient)
        except CannotMove as reason:
            return skipped(str(reason))
        if error <= tolerance(self.subject.outputs.dtype):
            return Finding("ok", "agrees", f"relative error {error:.0e}", number=error)
        return Finding(
            "fails",
            "differs",
            f"by {error:.0e} relative from what the loss's own values say: something is detached, a backward is wrong "
            "(or meant so, as in a straight-through estimator), or the outputs lie on a kink",
            number=error,
        )

    def find_hessian(self, repeatable: bool) -> Finding:
        """The Hessian by double backward; where that is zero, whether the gradient does change."""
        assert self.gradient is not None
        flat = repeatable and self._is_flat()
        none_to_take = "the gradient does not change around these outputs: a piecewise linear loss"
        try:
            products = self.subject.hessian_products(self.probes)
        except Exception as error:
            words, remedy = in_plain_words(error)
            if flat:
                return Finding("note", "zero", f"{none_to_take} ({words})", cause=first_line(error))
            return Finding("fails", "missing", words, remedy, first_line(error))
        if not bool(torch.isfinite(products).all()):
            return Finding(
                "fails", "non-finite", "NaN or infinite, where the gradient is finite", "look for powers below 2 at 0"
            )
        self.products = products
        if bool(products.any()):
            return Finding("ok", "exact", "" if repeatable else "not compared with differences")
        if flat or not repeatable:
            return Finding("note", "zero", none_to_take)
        return Finding(
            "fails",
            "missing",
            "autograd gives zero, but the gradient does change: the backward of an autograd.Function works outside the "
            "graph (numpy, detached tensors, once_differentiable)",
            "write that backward in torch operations on saved tensors, or use curvature='fisher'",
        )

    def _is_flat(self) -> bool:
        assert self.gradient is not None
        try:
            return is_flat(self.subject, self.gradient)
        except CannotMove:
            return False

    def compare_hessian(self, repeatable: bool) -> Finding:
        """The Hessian against differences of the gradient."""
        if self.products is None or not bool(self.products.any()):
            return skipped("there is no Hessian to compare")
        if not repeatable:
            return skipped("a second call gives another gradient")
        try:
            error = hessian_error(self.subject, self.products)
        except CannotMove as reason:
            return skipped(str(reason))
        if error <= tolerance(self.subject.outputs.dtype):
            return Finding("ok", "agrees", f"relative error {error:.0e}", number=error)
        return Finding(
            "fails",
            "differs",
            f"by {error:.0e} relative from how the gradient changes: a part of the second derivative is lost (a "
            "backward that works outside the graph), or the outputs lie on a kink",
            number=error,
        )
