"""``Fault``: how to provoke one fault, what the user sees, what stays as it was; and the words its rows share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.faults.doors import DOORS, Batch, Loss
from tests.faults.provocations import GOOD, Net, bce
from torch import nn


@dataclass(frozen=True)
class Seen:
    """What the user sees.

    Attributes:
        error: the class that is raised, at the first step that shows the fault.
        message: a part of the error's message, or of the warning's.
        warns: whether there is one warning.
        fallbacks: the count in ``diagnostics()``.
    """

    error: type[Exception] | None = None
    message: str = ""
    warns: bool = False
    fallbacks: int = 0


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A row of the table: a few training steps with one thing wrong, and what must come of them.

    Attributes:
        title: the fault.
        provoked: how the test brings it about, in a few words.
        model: makes the model.
        loss: of the model's outputs and the targets.
        batches: one training step each. A bad batch between two good ones shows that the later step is unharmed.
        options: of the door: ``damping``, ``curvature`` and the like.
        doors: those through which the fault is provoked.
        sees: one for all doors, or one for each.
        intact: names of the promises that are tested, from ``promises.INTACT``.
        known_issues: by door, where a promise is not kept yet, and why.
    """

    title: str
    provoked: str
    model: Callable[[], nn.Module] = Net
    loss: Loss = bce
    batches: tuple[Batch, ...] = (GOOD,)
    options: Mapping[str, Any] = field(default_factory=dict)
    doors: tuple[str, ...] = DOORS
    sees: Seen | Mapping[str, Seen]
    intact: tuple[str, ...]
    known_issues: Mapping[str, str] = field(default_factory=dict)

    def seen(self, door: str) -> Seen:
        """What is seen through one door."""
        return self.sees if isinstance(self.sees, Seen) else self.sees[door]


FISHER, HESSIAN = {"damping": 0.1}, {"curvature": "hessian", "damping": 0.1}
NOTHING, ONE_FALLBACK = Seen(), Seen(fallbacks=1)
LOOPS, HOOKED = ("newton_loss", "LossHook"), ("LossHook", "NewtonLosses")


def by_door(newton_loss: Seen, hooked: Seen) -> dict[str, Seen]:
    """Both hooked doors show the same."""
    return {"newton_loss": newton_loss, "LossHook": hooked, "NewtonLosses": hooked}
