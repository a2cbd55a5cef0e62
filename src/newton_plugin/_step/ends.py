"""The boundaries of one loss, with everything that a step at them needs to know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.autograd.graph import Node

from newton_plugin._boundary.autograd_graph import Boundary
from newton_plugin._boundary.rows import RowLayout, layout_of
from newton_plugin._derivatives.closed_forms import ClosedForm, find_closed_form
from newton_plugin._step.heads import UNSEEN, LayerHead, head_of
from newton_plugin._step.rule import StepRule
from newton_plugin._step.settings import RuleSettings

__all__ = ["Ends", "Source", "layout_at"]

Source = ClosedForm | Literal["products"] | None
"""Where the second derivatives at a boundary come from; None: its rule asks for none."""


def layout_at(boundary: Boundary, settings: RuleSettings) -> RowLayout:
    """The samples and features of outputs: as the user says, else as the graph tells, else the first dimension."""
    return layout_of(boundary.shape, boundary.features if settings.features is None else settings.features)


@dataclass(frozen=True)
class Ends:
    """Where a loss ends, boundary by boundary.

    Attributes:
        boundaries: where outputs meet the loss.
        layouts: between the outputs of each boundary and their rows.
        rules: one for each boundary. Calls of one layer have the same rule: their rows are one batch.
        sources: of the second derivatives.
        heads: for each rule once, the last layer below its boundaries, or why none is seen; None: nobody looks.
        calls: the numbers of the boundaries that share a rule, for each rule once.
        samples: for each boundary N, the rows of all calls of its layer.
        beside: whether the loss reaches anything but its boundaries.
    """

    boundaries: Sequence[Boundary]
    layouts: list[RowLayout]
    rules: Sequence[StepRule]
    sources: list[Source]
    calls: list[list[int]]
    samples: list[int]
    beside: bool
    heads: list[LayerHead | str | None]

    @staticmethod
    def of(
        loss: Tensor,
        boundaries: Sequence[Boundary],
        rules: Sequence[StepRule],
        settings: RuleSettings,
        beside: bool = False,
    ) -> Ends:
        """Of a live loss."""
        layouts = [layout_at(b, settings) for b in boundaries]
        if len(layouts) == 1:  # nearly always
            source = _source(loss, boundaries[0], layouts[0], rules[0])
            heads = _heads(boundaries, layouts, rules, [[0]])
            return Ends(boundaries, layouts, rules, [source], [[0]], [layouts[0].rows], beside, heads)
        calls: list[list[int]] = []
        for k, rule in enumerate(rules):
            first = next((numbers for numbers in calls if rules[numbers[0]] is rule), None)
            calls.append([k]) if first is None else first.append(k)
        samples = [0] * len(layouts)
        sources: list[Source] = [None] * len(layouts)
        for numbers in calls:
            own: list[Source] = [_source(loss, boundaries[k], layouts[k], rules[k]) for k in numbers]
            # What is known in closed form at one call only is differentiated with the other calls.
            known = all(isinstance(source, ClosedForm) for source in own)
            for k, source in zip(numbers, own, strict=True):
                samples[k] = sum(layouts[j].rows for j in numbers)
                sources[k] = source if known else _together(own)
        return Ends(
            boundaries, layouts, rules, sources, calls, samples, beside, _heads(boundaries, layouts, rules, calls)
        )

    @property
    def one_size(self) -> bool:
        """Whether the loss's size is to be found before its gradient flows; see ``size.py``."""
        return any(rule.relative for rule in self.rules) and (len(self.calls) > 1 or self.beside)

    @property
    def observed(self) -> list[Node | None]:
        """For each boundary the operation whose incoming gradient decides its Hessian."""
        return [source.node if isinstance(source, ClosedForm) else None for source in self.sources]

    def describe(self) -> str:
        """What all ranks have to agree on."""
        names = (
            f"{b.name!r} with {a.features} features" + f" at {a.groups} positions" * (r.curvature.structure == "block")
            for b, a, r in zip(self.boundaries, self.layouts, self.rules, strict=True)
        )
        heads = [head.widths if isinstance(head, LayerHead) else "unseen" for head in self.heads if head is not None]
        seen = f"; last layers: {', '.join(heads)}" if heads else ""
        return "; ".join(names) + (", and terms beside" if self.beside and self.one_size else "") + seen


def _heads(
    boundaries: Sequence[Boundary], layouts: Sequence[RowLayout], rules: Sequence[StepRule], calls: list[list[int]]
) -> list[LayerHead | str | None]:
    heads: list[LayerHead | str | None] = []
    for numbers in calls:
        rule, head = rules[numbers[0]], None
        if rule.curvature.takes_head and rule.curvature.looks:
            head = head_of([boundaries[k] for k in numbers], [layouts[k] for k in numbers])
            rule.last_layer = f"{UNSEEN}{head}" if isinstance(head, str) else str(head)
        heads.append(head)
    return heads


def _source(loss: Tensor, boundary: Boundary, layout: RowLayout, rule: StepRule) -> Source:
    """The closed form of the Hessian, if its rule asks for a Hessian and there is one."""
    closed_form = None
    if loss.grad_fn is not None and rule.wants_closed_form(layout.features):
        closed_form = find_closed_form(loss.grad_fn, boundary, layout)
    products = closed_form is None and rule.wants_products(layout.features)
    return "products" if products else closed_form


def _together(sources: Sequence[Source]) -> Source:
    return None if all(source is None for source in sources) else "products"
