"""The package's own curvatures, one for each replica of a batch that holds all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import newton_plugin as npl

__all__ = ["Grouped", "Tally", "live_share"]


def live_share(rows: Tensor) -> Tensor:
    """The share of the rows that have a gradient, by which the package scales the gradients of a mean."""
    live = rows.any(-1).sum()
    return live.masked_fill(live == 0, len(rows)).to(rows.dtype) / len(rows)


class Tally:
    """Batches that kept their plain gradient, by replica; survives the copy that a loss makes of its curvature."""

    def __init__(self, replicas: int, device: str = "cpu") -> None:
        self.kept = torch.zeros(replicas, dtype=torch.int64, device=device)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tally:
        return self


class Grouped(npl.Curvature):
    """A curvature for rows (R * N, m): those of a replica go to a rule of its own, as if it were trained alone.

    It keeps no state: runs are never continued in the middle.

    Args:
        rules: curvature and damping of every replica, each with a running state of its own.
        tally: counts what the rules could not do.
    """

    def __init__(self, rules: Sequence[tuple[npl.Curvature, npl.Damping]], tally: Tally) -> None:
        self.rules, self.tally = list(rules), tally
        self.needs_hessian = rules[0][0].needs_hessian

    def step(self, gradient: Tensor, hvp: Callable[[Tensor], Tensor] | None, damping: npl.Damping) -> npl.CurvatureStep:
        """See :meth:`newton_plugin.Curvature.step`; ``damping`` is not used."""
        blocks = gradient.chunk(len(self.rules))
        products = self._products(gradient, hvp)
        whole = live_share(gradient)
        steps, result = [], None
        for r, ((curvature, rule), g, product) in enumerate(zip(self.rules, blocks, products, strict=True)):
            share = live_share(g)  # of this replica, as if it were trained alone
            own = g * (share / whole)
            scaled = None if product is None else _times(product, share / whole)
            more = {"live": (share * len(g)).round()} if curvature.takes_live else {}
            result = curvature.step(own, scaled, rule, **more)
            fine = torch.isfinite(result.step).all() & torch.isfinite(g).all()
            if result.finiteness.curvature is not None:
                fine = fine & result.finiteness.curvature
            steps.append(torch.where(fine, result.step * (whole / share), g))
            self.tally.kept[r] += ~fine
        assert result is not None
        return npl.CurvatureStep(torch.cat(steps), result.damping, extremes=result.extremes, fallback=result.fallback)

    def _products(self, gradient: Tensor, hvp: Callable[[Tensor], Tensor] | None) -> list[Any]:
        """Hessian-vector products of each block, from one round of probes for all."""
        if hvp is None:
            return [None] * len(self.rules)
        n, m = gradient.shape
        eye = torch.eye(m, dtype=gradient.dtype, device=gradient.device)
        columns = hvp(eye.unsqueeze(1).expand(-1, n, -1)).movedim(0, -1)  # (N, m, m)
        return [lambda v, h=block: torch.einsum("nij,knj->kni", h.to(v), v) for block in columns.chunk(len(self.rules))]


def _times(product: Callable[[Tensor], Tensor], factor: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda v: product(v) * factor.to(v)
