"""check_loss: calls a loss in every way in which it may be used, and reports what works."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from newton_plugin._boundary.rows import RowLayout, check_feature_dims
from newton_plugin._curvature.sizes import AUTO_FEATURES, FORMED_FROM_PRODUCTS
from newton_plugin._doors.newton_loss import NewtonLoss
from newton_plugin._errors import ArgumentTypeError, NonFiniteError, ShapeError, check_choice, check_floating
from newton_plugin.testing._behaviour import coupling, definiteness, determinism, hessian_cost, precision
from newton_plugin.testing._derivatives import Derivatives
from newton_plugin.testing._doors import has_closed_form, taken_by
from newton_plugin.testing._reasons import first_line, in_plain_words
from newton_plugin.testing._reduction import reduction
from newton_plugin.testing._report import Finding, LossReport, skipped
from newton_plugin.testing._subject import Subject
from newton_plugin.testing._transforms import by_func_gradient, by_func_hessian, by_func_per_sample

__all__ = ["check_loss"]

_MOST_ENTRIES = 2**25  # numbers in all samples' Hessians together: 256 MB


def check_loss(
    loss_fn: Callable[..., Any],
    outputs: Tensor,
    *args: Any,
    reduction: Literal["mean", "sum"] = "mean",
    feature_dims: int | Sequence[int] | None = None,
    loss_kwargs: Mapping[str, Any] | None = None,
) -> LossReport:
    """Try every way in which ``loss_fn(outputs, *args)`` may be used; ``print`` the report that comes back.

    An error inside the loss is not raised: it becomes a finding, with the reason and a remedy. Checks are made in
    float64 where the loss can be evaluated there. The loss is called some hundred times, always from the same random
    state, which is restored; modules are copied, so that their buffers stay as they are.

    Args:
        loss_fn: a function or module that returns one number, or one for each sample. Of a loss that is wrapped by
            ``newton_loss``, the loss inside is checked.
        outputs: (N, ...), a small batch (say 2 to 64 samples) as the model might return it; need not require grad.
            The findings hold at *these* outputs: take them from the region that training goes through.
        *args: further arguments of ``loss_fn``.
        reduction, feature_dims: as for :class:`newton_plugin.LossHook`.
        loss_kwargs: keyword arguments of ``loss_fn``.

    Raises:
        ArgumentTypeError: ``loss_fn`` is not callable, ``outputs`` no floating-point tensor.
        ShapeError: outputs without a batch dimension, or without samples or features.
        NonFiniteError: outputs that are NaN or infinite.

    Example:
        >>> import torch
        >>> from newton_plugin.testing import check_loss
        >>> y, prototypes = torch.arange(6.0).reshape(3, 2) / 7, torch.eye(2)
        >>> report = check_loss(lambda y: torch.cdist(y, prototypes.to(y)).square().sum(-1).mean(), y)
        >>> print(report.hessian.verdict, "-", report.hessian.words)
        missing - torch has no derivative of _cdist_backward, so the loss cannot be differentiated twice
        >>> report.curvature
        'fisher'
    """
    if not callable(loss_fn):
        raise ArgumentTypeError(f"loss_fn must be callable; got {type(loss_fn).__name__}.")
    loss_fn = loss_fn.loss_fn if isinstance(loss_fn, NewtonLoss) else loss_fn
    check_floating("outputs", outputs)
    check_choice("reduction", reduction, ("mean", "sum"))
    layout = RowLayout(tuple(outputs.shape), check_feature_dims(feature_dims))
    if not outputs.numel():
        raise ShapeError(f"outputs must hold at least one sample and one feature; got shape {tuple(outputs.shape)}.")
    if not bool(torch.isfinite(outputs).all()):
        raise NonFiniteError("outputs must be finite; got NaN or infinite values. Pass what a trained model may give.")
    subject = Subject(loss_fn, outputs, args, loss_kwargs or {}, layout, reduction)
    with warnings.catch_warnings(), torch.enable_grad(), torch.autocast(outputs.device.type, enabled=False):
        warnings.simplefilter("ignore")
        return _Check(subject, _name(loss_fn)).report()


def _name(loss_fn: Callable[..., Any]) -> str:
    return getattr(loss_fn, "__qualname__", type(loss_fn).__name__)


class _Check:
    """The findings of one call, each made once, in an order in which later ones use earlier ones."""

    def __init__(self, native: Subject, name: str) -> None:
        self.native, self.name = native, name  # native: in the dtype in which the outputs were given
        self.found: dict[str, Finding] = {}

    def report(self) -> LossReport:
        self.found["evaluation"] = _evaluation(self.native)
        layout = self.native.layout
        if self.found["evaluation"].ok:
            self._look()
        else:
            self._skip_rest("the loss could not be evaluated")
        curvature, why = self._choose()
        reached = self.found["gradient"].ok
        return LossReport(
            name=self.name,
            samples=layout.rows,
            features=layout.features,
            **self.found,
            curvature=curvature,
            why=why,
            auto=taken_by(self.native, "auto") if reached else None,
            asked=taken_by(self.native, "hessian") if reached else None,
        )

    def _skip_rest(self, why: str) -> None:
        for name, kind in LossReport.__annotations__.items():
            if kind == "Finding":
                self.found.setdefault(name, skipped(why))

    def _look(self) -> None:
        found = self.found
        subject = _in_float64(self.native)
        derivatives = Derivatives(subject)
        found["gradient"] = derivatives.find_gradient()
        if derivatives.gradient is None:
            found["func_gradient"] = by_func_gradient(subject, None)
            self._skip_rest("there is no gradient")
            return
        found["determinism"] = _guarded(lambda: determinism(subject))
        random = found["determinism"].verdict != "deterministic"
        found["reduction"] = skipped("random numbers differ by batch") if random else reduction(subject)
        repeatable = found["determinism"].verdict != "unrepeatable"
        found["gradient_differences"] = derivatives.compare_gradient(repeatable)
        if found["gradient_differences"].status == "fails":
            found["gradient"] = Finding("note", "wrong", found["gradient_differences"].words)
        found["hessian"] = derivatives.find_hessian(repeatable)
        found["hessian_differences"] = derivatives.compare_hessian(repeatable)
        if found["hessian_differences"].status == "fails":
            found["hessian"] = Finding("fails", "wrong", found["hessian_differences"].words, _DIFFERENTIABLE)
        found["coupling"] = coupling(subject, derivatives.gradient) if repeatable else skipped("it is unrepeatable")
        self._look_at_curvature(subject, derivatives)
        found["precision"] = self._precision()

    def _look_at_curvature(self, subject: Subject, derivatives: Derivatives) -> None:
        found, m = self.found, subject.layout.features
        blocks = None
        if found["hessian"].verdict != "exact":
            found["definiteness"] = found["cost"] = skipped("there is no Hessian to look at")
        elif m > FORMED_FROM_PRODUCTS:
            found["definiteness"] = found["cost"] = skipped(f"{m} features would take {m} products")
        elif m * m * subject.layout.rows > _MOST_ENTRIES:
            found["definiteness"] = found["cost"] = skipped("pass fewer samples to look at their Hessians")
        else:
            if found["coupling"].verdict == "coupled":
                found["definiteness"] = skipped("no sample has a Hessian of its own")
            else:
                blocks = subject.blocks()
                found["definiteness"] = _guarded(lambda: definiteness(blocks))
            found["cost"] = _guarded(lambda: hessian_cost(self.native, has_closed_form(self.native)))
        found["func_gradient"] = by_func_gradient(subject, derivatives.gradient)
        trusted = found["hessian"].ok
        found["func_hessian"] = by_func_hessian(subject, derivatives.products, derivatives.probes, trusted)
        found["func_per_sample"] = by_func_per_sample(subject, blocks)

    def _precision(self) -> Finding:
        if self.found["determinism"].verdict != "deterministic":
            return skipped("random numbers differ by dtype")
        return precision(self.native, self.found["hessian"].verdict == "exact")

    def _closed_form(self) -> bool:
        try:
            return has_closed_form(self.native)
        except Exception:  # raised by the loss; another finding reports it
            return False

    def _choose(self) -> tuple[Literal["hessian", "fisher"] | None, str]:
        hessian, m = self.found["hessian"], self.native.layout.features
        if not self.found["evaluation"].ok:
            return None, self.found["evaluation"].words
        if not self.found["gradient"].ok:
            return None, self.found["gradient"].words
        if m > AUTO_FEATURES and not self._closed_form():
            return "fisher", f"{m} features would take {m} Hessian-vector products a step"
        if hessian.verdict == "exact" and self.found["coupling"].verdict == "coupled":
            return "fisher", "the loss couples the samples of a batch"
        if hessian.verdict == "exact" and m > AUTO_FEATURES:
            return "hessian", "the plugin knows it in closed form, and takes no Hessian-vector products"
        if hessian.verdict == "exact":
            return "hessian", "the Hessian is there and right; 'fisher' and 'norm' need the gradient only"
        return "fisher", f"the Hessian is {hessian.verdict}"


_DIFFERENTIABLE = "write the backward of its autograd.Function in torch operations on saved tensors, nothing detached"


def _evaluation(subject: Subject) -> Finding:
    try:
        value = subject.total(subject.outputs.clone())
    except Exception as error:
        words, remedy = in_plain_words(error)
        return Finding("fails", "fails", words, remedy, first_line(error))
    number = float(value.detach()) / (subject.layout.rows if subject.reduction == "mean" else 1)
    if not bool(torch.isfinite(value)):
        return Finding(
            "fails", "non-finite", f"the loss is {number} at these outputs", "see what overflows, or divides by 0"
        )
    return Finding("ok", "works", f"{number:.6g}", number=number)


def _guarded(look: Callable[[], Finding]) -> Finding:
    """The finding of ``look()``; where that raises, a skipped finding with the reason."""
    try:
        return look()
    except Exception as error:
        words, _ = in_plain_words(error)
        return Finding("skipped", "not looked at", words, cause=first_line(error))


def _in_float64(native: Subject) -> Subject:
    """The subject in float64; unchanged where the loss cannot be evaluated in float64."""
    try:
        subject = native.to(torch.float64)
        whole = subject.total(subject.outputs.clone())
    except Exception:
        return native
    return subject if whole.dtype == torch.float64 else native
