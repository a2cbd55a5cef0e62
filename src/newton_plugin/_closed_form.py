r"""Closed-form Hessians of PyTorch's standard losses, as Hessian-vector products in O(m).

With respect to the outputs y of one sample (p = softmax(y), s = sigmoid(y)):

* ``mse_loss``: ``2 I``;
* ``binary_cross_entropy_with_logits``: ``diag(w s (1 - s) (pos_weight t + 1 - t))``;
* ``cross_entropy``: ``a (diag(p) - p p')``, where a is the weight that the sample's targets carry:
  ``(1 - eps) w_t + eps/m sum_c w_c`` for a class index t, ``sum_c w_c t_c`` for (smoothed) probabilities, and 0
  where the target is ``ignore_index``.

Each divided by what the loss's own reduction divides by.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from newton_plugin._curvature import HVP
from newton_plugin._rows import RowLayout
from newton_plugin._solve import working_dtype

__all__ = ["closed_form_hvp"]

_MODULES: dict[type[nn.Module], tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    nn.MSELoss: (F.mse_loss, ("reduction",)),
    nn.CrossEntropyLoss: (F.cross_entropy, ("weight", "ignore_index", "reduction", "label_smoothing")),
    nn.BCEWithLogitsLoss: (F.binary_cross_entropy_with_logits, ("weight", "reduction", "pos_weight")),
}


def closed_form_hvp(
    loss_fn: Callable[..., Any],
    outputs: Tensor,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    layout: RowLayout,
    reduction: str,
) -> HVP | None:
    """Products with the Hessian of each sample's loss, or None where ``loss_fn`` is not recognised.

    Args:
        loss_fn: a function of ``torch.nn.functional`` or the loss module of the same name, no subclass.
        outputs: the first argument of the call.
        args, kwargs: of the whole call, ``outputs`` included.
        layout: rows of the outputs.
        reduction: "mean" or "sum": how the loss relates to the losses of the samples.
    """
    function, extra = loss_fn, {}
    if type(loss_fn) in _MODULES:
        function, names = _MODULES[type(loss_fn)]  # type: ignore[index]
        extra = {name: getattr(loss_fn, name) for name in names}
    form = _FORMS.get(function)
    if form is None:
        return None
    try:
        bound = inspect.signature(function).bind(*args, **{**kwargs, **extra})
    except TypeError:
        return None  # the call itself failed, or is about to: its own message is better than ours
    bound.apply_defaults()
    call = bound.arguments
    if call["input"] is not outputs or call.get("size_average") is not None or call.get("reduce") is not None:
        return None
    coefficient = form(outputs.detach().to(working_dtype(outputs.device)), call, layout)
    if coefficient is None:
        return None
    product, own_reduction = coefficient
    scale = layout.rows if reduction == "mean" and own_reduction != "none" else 1
    return lambda vectors: product(vectors) * scale


Form = tuple[HVP, str]


def _mse(y: Tensor, call: Mapping[str, Any], layout: RowLayout) -> Form | None:
    if call["reduction"] == "none" or call["target"].shape != y.shape or call.get("weight") is not None:
        return None
    factor = 2 / y.numel() if call["reduction"] == "mean" else 2.0
    return (lambda vectors: vectors * factor), call["reduction"]


def _binary_cross_entropy(y: Tensor, call: Mapping[str, Any], layout: RowLayout) -> Form | None:
    target = call["target"]
    if call["reduction"] == "none" or target.shape != y.shape:
        return None
    s = torch.sigmoid(y)
    diagonal = s * (1 - s)
    if call["pos_weight"] is not None:
        diagonal = diagonal * (call["pos_weight"].to(y) * target + 1 - target)
    if call["weight"] is not None:
        diagonal = diagonal * call["weight"].to(y)
    if call["reduction"] == "mean":
        diagonal = diagonal / y.numel()
    rows = layout.to_rows(diagonal)
    return (lambda vectors: vectors * rows), call["reduction"]


def _cross_entropy(y: Tensor, call: Mapping[str, Any], layout: RowLayout) -> Form | None:
    if y.ndim != 2 or (layout.rows, layout.features) != y.shape:
        return None
    target, reduction, smoothing = call["target"], call["reduction"], call["label_smoothing"]
    classes = y.shape[1]
    weight = torch.ones(classes).to(y) if call["weight"] is None else call["weight"].to(y)
    if target.is_floating_point():
        if target.shape != y.shape:
            return None
        smooth = target.to(y) * (1 - smoothing) + smoothing / classes
        carried, total = smooth @ weight, y.shape[0]
    else:
        if target.shape != y.shape[:1]:
            return None
        counted = target != call["ignore_index"]
        own = torch.where(counted, weight[torch.where(counted, target, 0)], 0.0)
        carried = (1 - smoothing) * own + torch.where(counted, smoothing / classes * weight.sum(), 0.0)
        total = own.sum()
    if reduction == "mean":
        carried = carried / total
    p, a = torch.softmax(y, -1), carried.unsqueeze(-1)
    return (lambda vectors: a * (p * vectors - p * (p * vectors).sum(-1, keepdim=True))), reduction


_FORMS: dict[Callable[..., Any], Callable[[Tensor, Mapping[str, Any], RowLayout], Form | None]] = {
    F.mse_loss: _mse,
    F.cross_entropy: _cross_entropy,
    F.binary_cross_entropy_with_logits: _binary_cross_entropy,
}
