"""One fault: how to provoke it, what the user sees, what stays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.doors.each_door import DOORS, Batch, Loss
from tests.faults.provocations import GOOD, Net, bce
from torch import nn


@dataclass(frozen=True)
class Seen:
    """What the user sees.

    Attributes:
        error: the class that is raised, at the first step that shows the fault.
        message: a part of its message, or of the one warning's.
        warns: whether there is that warning.
        fallbacks: how many the hook counts.
    """

    error: type[Exception] | None = None
    message: str = ""
    warns: bool = False
    fallbacks: int = 0


@dataclass(frozen=True)
class Fault:
    """A row of the table.

    Attributes:
        title: the fault.
        provoked: how the test brings it about, in a few words.
        sees: one for all doors, or one for each.
        intact: names of what is asserted to be as it should; see ``tests.faults.promises``.
        known_issues: by door, where the promise is not kept yet, and why.
    """

    title: str
    provoked: str
    sees: Seen | Mapping[str, Seen]
    intact: tuple[str, ...]
    loss: Loss = bce
    batches: tuple[Batch, ...] = (GOOD,)
    options: Mapping[str, Any] = field(default_factory=dict)
    model: Callable[[], nn.Module] = Net
    doors: tuple[str, ...] = DOORS
    known_issues: Mapping[str, str] = field(default_factory=dict)

    def seen(self, door: str) -> Seen:
        """What is seen through one door."""
        return self.sees if isinstance(self.sees, Seen) else self.sees[door]


FISHER, HESSIAN = {"damping": 0.1}, {"curvature": "hessian", "damping": 0.1}
NOTHING, KEPT = Seen(), Seen(fallbacks=1)
LOOPS, HOOKED = ("newton_loss", "LossHook"), ("LossHook", "NewtonLosses")


def by_door(newton_loss: Seen, hooked: Seen) -> dict[str, Seen]:
    """Both hooked doors show the same."""
    return {"newton_loss": newton_loss, "LossHook": hooked, "NewtonLosses": hooked}
