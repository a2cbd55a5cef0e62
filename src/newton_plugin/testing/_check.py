"""check_loss: calls a loss in every way in which it may be used, and reports what works."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from newton_plugin._boundary.rows import RowLayout, check_feature_dims
from newton_plugin._curvature.sizes import FORMED_FROM_PRODUCTS
from newton_plugin._doors.newton_loss import NewtonLoss
from newton_plugin._errors import (
    ArgumentTypeError,
    NonFiniteError,
    ShapeError,
    as_real,
    check_choice,
    check_floating,
)
from newton_plugin.testing._advice import Evidence, advise
from newton_plugin.testing._behaviour import definiteness, determinism, hessian_cost, precision
from newton_plugin.testing._coupling import coupling
from newton_plugin.testing._derivatives import Derivatives
from newton_plugin.testing._doors import has_closed_form, taken_by
from newton_plugin.testing._gradients import ignored, spread, tail
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
        outputs: (N, ...), a small batch (say 10 to 64 samples) as the model might return it; need not require grad.
            The findings hold at *these* outputs: take them from the region that training goes through. Complex ones are
            looked at as pairs of real numbers.
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
        >>> report.available
        ('fisher', 'norm')
    """
    if not callable(loss_fn):
        raise ArgumentTypeError(f"loss_fn must be callable; got {type(loss_fn).__name__}.")
    loss_fn = loss_fn.loss_fn if isinstance(loss_fn, NewtonLoss) else loss_fn
    name, given = _name(loss_fn), outputs
    if isinstance(outputs, Tensor) and outputs.is_complex():
        loss_fn, outputs = _of_pairs(loss_fn), torch.view_as_real(outputs)
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
        return _Check(subject, name, _dtype(given)).report()


def _of_pairs(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """The loss as a function of real and imaginary parts, (..., 2)."""
    return lambda pairs, *args, **kwargs: loss_fn(torch.view_as_complex(pairs.contiguous()), *args, **kwargs)


def _dtype(outputs: Tensor) -> Finding:
    if not outputs.is_complex():
        return Finding("ok", "real")
    words = "each is looked at as two real features, its real and its imaginary part; training refuses complex outputs"
    return Finding("note", "complex", words, as_real("outputs"))


def _name(loss_fn: Callable[..., Any]) -> str:
    return getattr(loss_fn, "__qualname__", type(loss_fn).__name__)


class _Check:
    """The findings of one call, each made once, in an order in which later ones use earlier ones."""

    def __init__(self, native: Subject, name: str, outputs: Finding) -> None:
        self.native, self.name = native, name  # native: in the dtype in which the outputs were given
        self.found: dict[str, Finding] = {"outputs": outputs}

    def report(self) -> LossReport:
        self.found["evaluation"] = _evaluation(self.native)
        layout = self.native.layout
        if self.found["evaluation"].ok:
            self._look()
        else:
            self._skip_rest("the loss could not be evaluated")
        reached = self.found["gradient"].ok
        without = self._without_hessian()
        return LossReport(
            name=self.name,
            samples=layout.rows,
            features=layout.features,
            **self.found,
            available=() if not reached else ("fisher", "norm") if without else ("fisher", "norm", "hessian"),
            without_hessian=without,
            asked=taken_by(self.native) if reached else None,
            advice=advise(self._evidence()),
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
        rows = subject.layout.to_rows(derivatives.gradient)
        found["ignored"] = ignored(subject, derivatives.gradient) if repeatable else skipped("it is unrepeatable")
        found["tail"], found["spread"] = _guarded(lambda: tail(rows)), _guarded(lambda: spread(rows))
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

    def _without_hessian(self) -> str:
        """Why no Hessian can be used; empty where one can."""
        found = self.found
        if not found["gradient"].ok:
            return "there is no gradient"
        if found["hessian"].verdict != "exact":
            return f"it is {found['hessian'].verdict}"
        return "the loss couples the samples of a batch" if found["coupling"].verdict == "coupled" else ""

    def _fault(self) -> str:
        """What is wrong with the loss itself, in words; empty where nothing is."""
        found = self.found
        if not found["evaluation"].ok:
            return f"the loss gives no number here ({found['evaluation'].words})"
        if not found["gradient"].ok:
            return f"the gradient is {found['gradient'].verdict} ({found['gradient'].words})"
        if found["gradient"].verdict == "wrong":
            error = found["gradient_differences"].number or 0.0
            return f"your gradient is wrong by {_percent(error)} (against differences of the loss)"
        if found["precision"].status == "fails":
            error = found["precision"].number or 0.0
            return f"in float32 its derivatives are wrong by {_percent(error)} (against float64)"
        return ""

    def _evidence(self) -> Evidence:
        nothing = math.nan
        tail_of, spread_of = self.found["tail"].number, self.found["spread"].number
        return Evidence(
            fault=self._fault(),
            random=self.found["determinism"].verdict in ("random", "unrepeatable"),
            samples=self.native.layout.rows,
            tail=nothing if tail_of is None else tail_of,
            spread=nothing if spread_of is None else spread_of,
        )


def _percent(error: float) -> str:
    return f"{100 * error:.0f} %" if error < 100 else "more than a hundredfold"


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
