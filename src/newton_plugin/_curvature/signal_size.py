r"""A size that follows the gradient where a batch is noise, and stands against its vanishing where it is signal.

``z = exp L`` with ``L_t = L_(t-1) + e_t (log s_t - log s_(t-1))`` and the exponent ``e = 1 - 2 rho``, between 0 and
1/2: over times in which the share of signal rho stays the same z is ``s^e``. Up to a quarter of signal z is the root of
s: the step shrinks with the gradient, and the training anneals as plain training does. From half on batches are of
equal length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from newton_plugin._runtime.cuda_graphs import capturing, carried

__all__ = ["SignalSize"]


class SignalSize:
    """z, from step to step."""

    def __init__(self) -> None:
        self._state: Tensor | None = None  # log z and log s, (2,); NaN before the first
        self._in_place = False

    def update(self, s: Tensor, signal: Tensor) -> Tensor:
        """z after this batch; 1 at the first.

        Args:
            s: the running mean of ``mean |g|^2``, positive and finite, no dimensions.
            signal: rho, no dimensions.
        """
        self._in_place = self._in_place or capturing(s)
        log = s.log()
        before = self._before(log)
        moved = torch.rsub(signal, 1.0, alpha=2.0).clamp(0.0, 0.5) * (log - before[1])
        z = before[0] + moved.nan_to_num(0.0)  # NaN: there is no s before the first
        self._state = carried(self._state, torch.stack([z, log]), self._in_place)
        return z.exp()

    def _before(self, log: Tensor) -> Tensor:
        if self._state is None:
            return torch.stack([torch.zeros_like(log), log])
        return self._state.to(log)

    def initial_state(self, like: Tensor) -> dict[str, Any]:
        """The state before the first step."""
        return {"z": like.new_tensor([0.0, torch.nan])}

    def state_dict(self) -> dict[str, Any]:
        """log z and log s; empty before the first step."""
        if self._state is None:
            return {}
        return {"z": self._state.clone() if self._in_place else self._state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave.

        Raises:
            TypeError: a state of something else.
        """
        z = state.get("z")
        if not (z is None or isinstance(z, Tensor)):
            raise TypeError("the state of a size holds a tensor")
        self._state, self._in_place = z, False
