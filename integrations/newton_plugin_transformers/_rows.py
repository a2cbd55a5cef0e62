"""Selects the rows of logits, and their labels, that the loss is a mean of.

A language model's loss is a mean over *tokens*, without those that padding or a mask leaves out (label -100). These
tokens are the samples of a Newton step: one row of logits for each label that counts, no row for one that does not. If
padded tokens had rows, they would be samples with gradient zero, and C would shrink by the share of padding in the
batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from newton_plugin import ArgumentError, ArgumentTypeError, ShapeError

__all__ = ["IGNORED", "Rows", "select_rows"]

IGNORED = -100
"""The label, in all of transformers, of tokens that do not count."""


@dataclass
class Rows:
    """What enters the loss.

    Attributes:
        logits: (R, V), one row for each label that counts; without ``per_label`` the model's logits, unchanged.
        labels: (R,); without ``per_label`` the Trainer's labels, unchanged.
        count: the number of labels that count, as the Trainer counts ``num_items_in_batch``.
    """

    logits: Tensor
    labels: Tensor
    count: int | Tensor


def select_rows(outputs: Any, labels: Any, per_label: bool, shift_labels: bool | None) -> Rows:
    """The rows of a batch; with ``per_label`` waits for the device once, to learn how many labels count.

    Args:
        outputs: what the model returned: its ``logits``, or the first entry of a tuple.
        labels: the Trainer's ``labels``.
        per_label: whether the samples are the labels; otherwise they are the entries of the batch.
        shift_labels: whether the logits at a place predict the label of the next one.

    Raises:
        ArgumentError: no labels or no logits; ``shift_labels=None`` where it cannot be told.
        ArgumentTypeError: labels that are not a tensor.
        ShapeError: ``per_label`` without one integer for each row of logits.
    """
    logits = _logits(outputs)
    if labels is None:
        raise ArgumentError(
            "labels must be in the batch for a loss to be computed; got None. Name the column of the data set 'labels'."
        )
    if not isinstance(labels, Tensor):
        raise ArgumentTypeError(
            f"labels must be a torch.Tensor; got {type(labels).__name__}. For other labels override "
            "Trainer.compute_loss and use newton_plugin.LossHook there."
        )
    if not per_label:
        return Rows(logits, labels, labels.ne(IGNORED).sum())
    if labels.is_floating_point() or labels.shape != logits.shape[:-1]:
        raise ShapeError(
            f"a loss for each label needs one integer for each row of logits; got labels of shape "
            f"{tuple(labels.shape)}, {labels.dtype}, and logits of shape {tuple(logits.shape)}. For other losses pass "
            "the function, NewtonLosses(torch.nn.functional.binary_cross_entropy_with_logits), say."
        )
    if labels.ndim > 1 and _shifts(outputs, shift_labels):
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    counts = labels.ne(IGNORED).to(logits.device)
    rows = logits[counts]
    return Rows(rows, labels.to(logits.device)[counts], rows.shape[0])


def _logits(outputs: Any) -> Tensor:
    if isinstance(outputs, Mapping):
        logits = outputs.get("logits")
        seen = f"a model output with the keys {', '.join(map(repr, outputs))}"
    else:
        logits = outputs[0] if isinstance(outputs, (tuple, list)) and outputs else outputs
        seen = f"{type(outputs).__name__}"
    if not isinstance(logits, Tensor) or logits.ndim == 0:
        raise ArgumentError(
            f"outputs must hold logits (N, ...) under the key 'logits' or as the first entry; got {seen}. For other "
            "models override Trainer.compute_loss and use newton_plugin.LossHook there."
        )
    return logits


def _shifts(outputs: Any, shift_labels: bool | None) -> bool:
    if shift_labels is not None:
        return shift_labels
    kind = type(outputs).__name__
    if "CausalLM" in kind or not isinstance(outputs, Mapping) or type(outputs) is dict:
        raise ArgumentError(
            f"shift_labels must be given for a loss at each token of {kind}; got None. True: the logits at a token "
            "predict the next one, and the model shifts the labels itself (GPT-2, Llama and most language models). "
            "False: labels and logits are aligned (token classification, masked words, the decoders of BART)."
        )
    return False
