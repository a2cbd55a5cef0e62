"""Hessian-vector products of a loss that has already been computed, by differentiating its gradient again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from newton_plugin._boundary.autograd_graph import Boundary, differentiable_once, elements_between
from newton_plugin._boundary.rows import RowLayout
from newton_plugin._derivatives.autograd import first_line
from newton_plugin._derivatives.sample_hessians import HessianUnavailable, SampleHessians
from newton_plugin._runtime.fabric import past_fabrics_guard

__all__ = ["Probing", "hessian_products", "no_second_pass"]


@dataclass
class Probing:
    """What has been learned about differentiating one loss twice. A rule keeps it from step to step.

    Attributes:
        batched: whether one pass can take several vectors; False once an operation had no batching rule.
        verified: whether the loss is known to be differentiable twice; False as long as nobody has looked.
    """

    batched: bool = True
    verified: bool = False


def no_second_pass(cause: str) -> SampleHessians:
    """Hessians that a curvature asks for and nobody can compute: their products raise ``cause``."""

    def hvp(_: Tensor) -> Tensor:
        raise HessianUnavailable(cause)

    return SampleHessians(hvp)


def hessian_products(
    gradients: Sequence[Tensor],
    boundaries: Sequence[Boundary],
    layouts: Sequence[RowLayout],
    probing: Probing,
    cause: str,
    factor: Tensor | None = None,
) -> SampleHessians:
    """Products by differentiating ``gradients`` again.

    Args:
        gradients: of the loss at each boundary of one layer, in its shape, with its graph.
        boundaries: where they were taken: one, or all calls of the layer, whose rows follow one another.
        layouts: between the outputs and their rows.
        probing: what is known of this loss; learns.
        cause: why ``gradients`` cannot be differentiated; empty if they can.
        factor: what all products are multiplied by, no dimensions; None: 1.
    """
    inputs = [boundary.edge for boundary in boundaries]
    sizes = [layout.rows for layout in layouts]

    def run(probes: Sequence[Tensor], batched: bool) -> list[Tensor]:
        pairs = [(g, probe) for g, probe in zip(gradients, probes, strict=True) if g.requires_grad]
        with past_fabrics_guard():
            products = torch.autograd.grad(
                [g for g, _ in pairs],
                inputs,
                [probe for _, probe in pairs],
                is_grads_batched=batched,
                retain_graph=True,
                allow_unused=True,
            )
        return [torch.zeros_like(v) if p is None else p for v, p in zip(probes, products, strict=True)]

    def in_rows(parts: Sequence[Tensor]) -> Tensor:
        found = [layout.to_rows(part) for layout, part in zip(layouts, parts, strict=True)]
        rows = found[0] if len(found) == 1 else torch.cat(found, -2)
        return rows if factor is None else rows * factor.to(rows.dtype)

    def hvp(vectors: Tensor) -> Tensor:
        if cause or not any(g.requires_grad for g in gradients):
            raise HessianUnavailable(
                cause
                or "the gradient does not depend on the outputs (a piecewise linear loss, or one that is "
                "differentiable only once)"
            )
        if not probing.verified:
            if any(differentiable_once(g) for g in gradients):
                raise HessianUnavailable("an operation of the loss is differentiable only once")
            probing.verified = True
        split = [vectors] if len(sizes) == 1 else vectors.split(sizes, -2)
        probes = [layout.from_rows(part).to(g.dtype) for layout, part, g in zip(layouts, split, gradients, strict=True)]
        if probing.batched:
            try:
                return in_rows(run(probes, True)).to(vectors)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                probing.batched = False  # an operation without a batching rule: one probe at a time
        try:
            each = [run(probe, False) for probe in zip(*probes, strict=True)]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise HessianUnavailable(first_line(error)) from error
        return in_rows([torch.stack(part) for part in zip(*each, strict=True)]).to(vectors)

    at = boundaries[0].graph_edge
    return SampleHessians(hvp, elements=lambda: sum(elements_between(g, at) for g in gradients))
