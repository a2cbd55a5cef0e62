"""From what was seen of each sample in each epoch to one score of it; and how well a score separates wrong samples."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["FAMILIES", "OURS", "areas", "auroc", "family", "in_windows", "margin"]

OURS = "contradiction"
FAMILIES = (OURS, "loss", "gradient", "head gradient", "margin", "confident learning")
"""The first word, or words, of a score's name before its colon."""


def family(score: str) -> str:
    """``"loss"`` for ``"loss: last"``."""
    return score.partition(":")[0]


def in_windows(name: str, seen: Tensor) -> dict[str, Tensor]:
    """One score for each choice of epochs: (E, K) -> (K,) each, by ``"<name>, <epochs>"``.

    Args:
        name: of the quantity, with its family: ``"loss"``, ``"contradiction: cosine 0.9"``.
        seen: the quantity in every epoch; NaN where a sample was not seen.
    """
    epochs = len(seen)
    known = ~seen.isnan()
    last = (known * torch.arange(1, epochs + 1).unsqueeze(-1)).argmax(0, keepdim=True)
    values = {
        "all epochs": seen.nanmean(0),
        "from the second epoch": seen[1:].nanmean(0),
        "first half": seen[: max(1, epochs // 2)].nanmean(0),
    }
    if family(name) != OURS:
        values["last"] = seen.gather(0, last).squeeze(0)
    joint = ", " if ":" in name else ": "
    return {f"{name}{joint}{window}": value for window, value in values.items()}


def margin(outputs: Tensor, labels: Tensor) -> Tensor:
    """The label's score less the largest other one: (..., C), (...) -> (...)."""
    given = outputs.gather(-1, labels.unsqueeze(-1))
    others = outputs.scatter(-1, labels.unsqueeze(-1), -torch.inf)
    return given.squeeze(-1) - others.max(-1).values


def auroc(score: Tensor, wrong: Tensor) -> float:
    """The chance that a wrong sample scores higher than a right one; a tie counts half.

    >>> auroc(torch.tensor([0.1, 0.9, 0.5, 0.5]), torch.tensor([False, True, True, False]))
    0.875

    Raises:
        ValueError: a score that is NaN, or samples that are all right or all wrong.
    """
    if bool(score.isnan().any()):
        raise ValueError(f"score must hold no NaN; got {int(score.isnan().sum())}. Was every sample seen?")
    if bool(wrong.all()) or not bool(wrong.any()):
        raise ValueError(f"wrong must name some samples and not all; got {int(wrong.sum())} of {len(wrong)}.")
    ours, theirs = score[wrong].unsqueeze(-1), score[~wrong]
    return float(((ours > theirs).double() + (ours == theirs).double() / 2).mean())


def areas(scores: Mapping[str, Tensor], wrong: Tensor) -> dict[str, float]:
    """The AUROC of each score."""
    return {name: round(auroc(score, wrong), 5) for name, score in scores.items()}
