"""What a door has found under a loss, for people to read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from newton_plugin._boundary.autograd_graph import Boundary
from newton_plugin._boundary.rows import RowLayout
from newton_plugin._step.ends import layout_at
from newton_plugin._step.heads import UNSEEN
from newton_plugin._step.rule import StepRule
from newton_plugin._step.settings import RuleSettings

__all__ = ["Found", "FoundBoundary", "describe_boundaries"]


@dataclass(frozen=True)
class FoundBoundary:
    """One place where outputs met the last loss.

    Attributes:
        name: the layer that made the outputs, the argument, or the name that was given.
        shape: of the outputs.
        sample_dims: which dimensions count samples.
        samples: N.
        features: m, the features of a sample.
        curvature, damping: the rule there.
        calls: how many calls of the layer this loss has; they share one curvature.
        beside: what else the loss reaches, by name: its own parameters, terms of earlier layers.
        left_out: what could have been a boundary and is none, with the reason.
        last_layer: what a rule that looks at the last layer sees there, or why it sees none; empty if it does not look.
    """

    name: str
    shape: tuple[int, ...]
    sample_dims: tuple[int, ...]
    samples: int
    features: int
    curvature: str
    damping: str
    calls: int = 1
    beside: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    last_layer: str = ""

    def __str__(self) -> str:
        along = ", ".join(map(str, self.sample_dims)) if self.sample_dims else "none"
        calls = f", {self.calls} calls of one layer" if self.calls > 1 else ""
        return (
            f"{self.name!r} of shape {self.shape}, {self.samples} samples (dim {along}) x {self.features} "
            f"features{calls}"
        )


@dataclass(frozen=True)
class Found:
    """What a search has found, without the graph; put into words when somebody asks.

    Attributes:
        names, layouts, rules: of each boundary.
        beside, left_out: see :class:`FoundBoundary`.
    """

    names: Sequence[str] = ()
    layouts: Sequence[RowLayout] = ()
    rules: Sequence[StepRule] = ()
    beside: Sequence[str] = ()
    left_out: Sequence[str] = ()

    @staticmethod
    def of(
        boundaries: Sequence[Boundary],
        rules: Sequence[StepRule],
        settings: RuleSettings,
        beside: Sequence[str],
        left_out: Sequence[str],
    ) -> Found:
        """From the boundaries of a loss."""
        layouts = [layout_at(boundary, settings) for boundary in boundaries]
        return Found([boundary.name for boundary in boundaries], layouts, rules, beside, left_out)

    def boundaries(self) -> tuple[FoundBoundary, ...]:
        """For people."""
        return tuple(
            FoundBoundary(
                name,
                layout.shape,
                layout.sample_axes,
                layout.rows,
                layout.features,
                repr(rule.curvature),
                repr(rule.damping),
                sum(other is rule for other in self.rules),
                tuple(self.beside),
                tuple(self.left_out),
                rule.last_layer,
            )
            for name, layout, rule in zip(self.names, self.layouts, self.rules, strict=True)
        )


def describe_boundaries(found: Sequence[FoundBoundary]) -> str:
    """One line about all boundaries of a loss."""
    if not found:
        return "no boundary yet"
    parts = ["; ".join(map(str, found)), f"{found[0].curvature}, {found[0].damping}"]
    if found[0].beside:
        parts.append(f"beside: {', '.join(found[0].beside)}")
    if found[0].left_out:
        parts.append(f"left out: {'; '.join(found[0].left_out)}")
    unseen = {f.last_layer for f in found if f.last_layer.startswith(UNSEEN)}
    parts += sorted(unseen)
    return " | ".join(parts)
