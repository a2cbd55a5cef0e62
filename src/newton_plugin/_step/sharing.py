"""Do other terms of a backward pass share operations with a hooked loss? Looked at now and then, not at every step.

``lp = net(x).log_softmax(-1)`` may be used by a hooked loss and by an entropy bonus. The gradient that passes between
lp and the network is then the sum of both, and no hook can tell the parts apart. They are told apart by taking the
loss's own gradient in a pass of its own. That pass costs as much as the loss's backward, so it is made at the first
steps, then ever more rarely, and at every step only where somebody was found to share.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Sharing", "separate"]

_RAREST = 256  # steps from one look to the next
# How far two passes over the same operations may differ by rounding, of the largest element. In half precision a look
# costs nothing and a false alarm is harmless, so it is the more careful one.
_ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-4, torch.float16: 1e-3, torch.bfloat16: 8e-3}


class Sharing:
    """What is known about one loss: whether its operations also serve other terms.

    Attributes:
        found: whether they do. Once they did, every later step is made as if they do.
        unnoticed: the number of steps before the look that found it at which nobody looked.
    """

    def __init__(self) -> None:
        self.found = False
        self.unnoticed = 0
        self._steps = 0
        self._looks = 0
        self._seen: Tensor | None = None  # of the last look, on the device

    def due(self) -> bool:
        """Count a step; whether it is one at which to look: 1, 2, 4, 8, ..., every 256th, and the one after each.

        Two steps in a row: where two losses take turns, both are looked at.
        """
        self._steps += 1
        due = any(
            s > 0 and (s % _RAREST == 0 if s > _RAREST else s & (s - 1) == 0) for s in (self._steps, self._steps - 1)
        )
        self._looks += due
        return due

    def report(self, shared: Tensor) -> None:
        """Note what a look has seen, a boolean without dimensions; without waiting for the device."""
        self._seen = shared if self._seen is None else self._seen | shared

    def seen(self, like: Tensor) -> Tensor:
        """What the looks since the last :meth:`read` have seen, a boolean on the device of ``like``."""
        return torch.zeros((), dtype=torch.bool, device=like.device) if self._seen is None else self._seen

    def read(self) -> bool:
        """Whether a look so far has seen that somebody shares. After a look it waits for the device once."""
        if self._seen is not None:
            self.found, self._seen = bool(self._seen), None
            self.unnoticed = self._steps - self._looks if self.found else 0
        return self.found


def separate(arrived: Tensor, own: Tensor, sharing: Sharing) -> tuple[Tensor, Tensor]:
    """What arrives at a place of the graph, as the loss's own part and that of others; both without waiting.

    Args:
        arrived: the gradient.
        own: what the loss alone sends there in this backward pass.
        sharing: is told whether the two differ by more than rounding.
    """
    if not own.numel():
        return own, arrived
    rest = arrived - own
    beyond = rest.abs().amax() > _ROUNDING.get(arrived.dtype, _ROUNDING[torch.bfloat16]) * own.abs().amax()
    # What is not finite overflowed under this pass's scale: it says nothing.
    shared = beyond & torch.isfinite(rest).all()
    sharing.report(shared)
    return torch.where(shared, own, arrived), torch.where(shared, rest, 0.0)
