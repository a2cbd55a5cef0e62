"""First and second derivatives of a loss that has already been computed, from its live graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import Node

from newton_plugin._boundary.autograd_graph import Boundary, differentiable_once, elements_between
from newton_plugin._boundary.rows import RowLayout
from newton_plugin._derivatives.sample_hessians import HessianUnavailable, SampleHessians
from newton_plugin._errors import NoGradientError
from newton_plugin._runtime.fabric import past_fabrics_guard

__all__ = [
    "Gradients",
    "Probing",
    "Scaling",
    "SinglePassError",
    "hessian_products",
    "loss_gradients",
    "no_second_pass",
]

Scaling = Literal["mean", "sum", "per_row"]
"""How the gradient that arrives at the loss is spread over its samples."""


class SinglePassError(NoGradientError):
    """The backward of the loss can run only once: torch.compile lets it write into what the forward has saved."""


@dataclass
class Probing:
    """What has been learned about differentiating one loss twice. A rule keeps it from step to step.

    Attributes:
        batched: whether one pass can take several vectors; False once an operation had no batching rule.
        verified: whether the loss is known to be differentiable twice; False as long as nobody has looked.
    """

    batched: bool = True
    verified: bool = False


@dataclass
class Gradients:
    """First derivatives of one loss, in the scale of ``g_i``.

    Attributes:
        gradients: per-sample gradients at each boundary, in its shape.
        upstream: what arrives at each observed operation.
        cause: why ``gradients`` cannot be differentiated again; empty if they can or if nobody asked.
    """

    gradients: list[Tensor]
    upstream: list[Tensor | None]
    cause: str = ""


def loss_gradients(
    loss: Tensor,
    boundaries: Sequence[Boundary],
    layouts: Sequence[RowLayout],
    scaling: Scaling,
    observed: Sequence[Node | None],
    twice: bool,
    verified: bool = False,
) -> Gradients:
    """Per-sample gradients in the shape of the outputs, and the gradients that arrive at ``observed`` operations.

    For a mean the backward pass starts with the seed N. A multiplication by N afterwards would come too late: in half
    precision the gradients of a mean underflow.

    Args:
        loss: one number, or one for each row of a single boundary.
        boundaries: where outputs meet the loss.
        layouts: between the outputs of each boundary and their rows.
        scaling: how the reported loss is made of its samples.
        observed: for each boundary an operation whose incoming gradient is wanted, or None.
        twice: whether the gradients will be differentiated again.
        verified: whether ``twice`` has worked for this loss before.

    Raises:
        SinglePassError: the backward that torch.compile has made can run once, and the user needs it. Nothing has been
            computed then, and the graph is as it was.
    """
    seed = max(layout.rows for layout in layouts) if scaling == "mean" else 1
    if loss.dtype in (torch.float16, torch.bfloat16):
        seed = min(2 ** max(seed, 1).bit_length() // 2, 1024)  # a power of two: exact in a few bits of mantissa
    upstream: list[Tensor | None] = [None] * len(boundaries)
    cause = ""
    try:
        raw, changed = _differentiate(loss, seed, boundaries, observed, upstream, twice)
    except (torch.OutOfMemoryError, SinglePassError):
        raise
    except RuntimeError as error:
        if not twice:
            raise
        (raw, changed), cause = (
            _differentiate(loss, seed, boundaries, observed, upstream, False),
            _first_line(error),
        )
    if twice and not verified and changed():  # waits for the device
        cause = "a hook on the outputs changes their gradient, and would change the Hessian's columns as well"
    gradients = []
    for k, (value, boundary, layout) in enumerate(zip(raw, boundaries, layouts, strict=True)):
        factor = layout.rows / seed if scaling == "mean" and layout.rows != seed else 1.0
        if value is None:
            gradients.append(torch.zeros(boundary.shape, dtype=boundary.dtype, device=boundary.device))
        else:
            gradients.append(value if factor == 1 else value * factor)
        arrived = upstream[k]
        if arrived is not None and factor != 1:
            upstream[k] = arrived * factor
    return Gradients(gradients, upstream, cause)


def _differentiate(
    loss: Tensor,
    seed: float,
    boundaries: Sequence[Boundary],
    observed: Sequence[Node | None],
    upstream: list[Tensor | None],
    create_graph: bool,
) -> tuple[list[Tensor | None], Callable[[], bool]]:
    """``seed * d loss / d boundary``, as the loss's own operations send it; fills ``upstream``.

    What autograd returns for the boundary has passed the hooks that a user may have put on that tensor: they fire in
    every backward pass. They belong below the loss and see the step later. So the gradient is recorded before them.

    Returns:
        the gradients, and a function that tells whether such hooks have changed what autograd returned.
    """
    sent: list[Tensor | None] = [None] * len(boundaries)

    def record_sent(which: int, positions: Sequence[int]) -> Callable[[Any, Any], None]:
        def hook(grad_inputs: tuple[Tensor | None, ...], _: Any) -> None:
            for position in positions:
                grad, before = grad_inputs[position], sent[which]
                if grad is not None:
                    sent[which] = grad if before is None else before + grad

        return hook

    def record_arrived(which: int) -> Callable[[Any, Any], None]:
        def hook(_: Any, grad_outputs: tuple[Tensor | None, ...]) -> None:
            upstream[which] = grad_outputs[0]

        return hook

    handles = [
        node.register_hook(record_sent(which, positions))
        for which, boundary in enumerate(boundaries)
        for node, positions in boundary.consumers
    ]
    handles += [node.register_hook(record_arrived(which)) for which, node in enumerate(observed) if node is not None]
    try:
        with torch.enable_grad(), past_fabrics_guard():
            returned = torch.autograd.grad(
                loss,
                [b.edge for b in boundaries],
                torch.full_like(loss, seed),
                retain_graph=True,
                create_graph=create_graph,
                allow_unused=True,
            )
    except RuntimeError as error:
        if "donated buffers" in str(error):
            raise SinglePassError(
                "torch.compile has made a backward of this loss that runs once (donated buffers): there is no double "
                "backward through it, and no pass of its own for a step that needs one. Compile the network and not "
                "the loss, or set torch._functorch.config.donated_buffer = False before it is compiled."
            ) from error
        raise
    finally:
        for handle in handles:
            handle.remove()

    def changed() -> bool:
        pairs = [(r, s) for r, s in zip(returned, sent, strict=True) if r is not None and s is not None]
        return any(not torch.allclose(r, s, rtol=1e-3, equal_nan=True) for r, s in pairs)

    return [r if s is None else s for r, s in zip(returned, sent, strict=True)], changed


def no_second_pass(cause: str) -> SampleHessians:
    """Hessians that a curvature asks for and nobody can compute: their products raise ``cause``."""

    def hvp(_: Tensor) -> Tensor:
        raise HessianUnavailable(cause)

    return SampleHessians(hvp)


def hessian_products(
    gradient: Tensor, boundary: Boundary, layout: RowLayout, probing: Probing, cause: str
) -> SampleHessians:
    """Products by differentiating ``gradient`` again.

    Args:
        gradient: of the loss at the boundary, in its shape, with its graph.
        boundary: where it was taken.
        layout: between the outputs and their rows.
        probing: what is known of this loss; learns.
        cause: why ``gradient`` cannot be differentiated; empty if it can.
    """

    def run(probes: Tensor, batched: bool) -> Tensor:
        with past_fabrics_guard():
            (product,) = torch.autograd.grad(
                gradient, boundary.edge, probes, is_grads_batched=batched, retain_graph=True, allow_unused=True
            )
        return torch.zeros_like(probes) if product is None else product

    def hvp(vectors: Tensor) -> Tensor:
        if cause or not gradient.requires_grad:
            raise HessianUnavailable(
                cause
                or "the gradient does not depend on the outputs (a piecewise linear loss, or one that is "
                "differentiable only once)"
            )
        if not probing.verified:
            if differentiable_once(gradient):
                raise HessianUnavailable("an operation of the loss is differentiable only once")
            probing.verified = True
        probes = layout.from_rows(vectors).to(gradient.dtype)
        if probing.batched:
            try:
                return layout.to_rows(run(probes, True)).to(vectors)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                probing.batched = False  # an operation without a batching rule: one probe at a time
        try:
            products = torch.stack([run(probe, False) for probe in probes])
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise HessianUnavailable(_first_line(error)) from error
        return layout.to_rows(products).to(vectors)

    at = boundary.graph_edge
    return SampleHessians(hvp, elements=lambda: elements_between(gradient, at))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
