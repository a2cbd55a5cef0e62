"""First derivatives of a loss that has already been computed, from its live graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node

from newton_plugin._boundary.autograd_graph import Boundary, Edge
from newton_plugin._errors import NoGradientError
from newton_plugin._runtime.fabric import past_fabrics_guard

__all__ = [
    "Gradients",
    "Parts",
    "Scaling",
    "SinglePassError",
    "first_line",
    "loss_gradients",
    "own_parts",
    "own_seed",
]

Scaling = Literal["mean", "sum", "per_row"]
"""How the gradient that arrives at the loss is spread over its samples."""

Parts = list[list[list[Tensor | None]]]
"""What each consumer of each boundary sends there, at each of its positions."""


class SinglePassError(NoGradientError):
    """The backward of the loss can run only once: torch.compile lets it write into what the forward has saved."""


@dataclass
class Gradients:
    """First derivatives of one loss, in the scale of ``g_i``.

    Attributes:
        gradients: per-sample gradients at each boundary, in its shape.
        upstream: what arrives at each observed operation.
        parts: what the consumers sent, times ``seed``.
        seed: with which the pass began.
        cause: why ``gradients`` cannot be differentiated again; empty if they can or if nobody asked.
    """

    gradients: list[Tensor]
    upstream: list[Tensor | None]
    parts: Parts
    seed: float
    cause: str = ""


def loss_gradients(
    loss: Tensor,
    boundaries: Sequence[Boundary],
    samples: Sequence[int],
    scaling: Scaling,
    observed: Sequence[Node | None],
    twice: bool,
    verified: bool = False,
) -> Gradients:
    """Per-sample gradients in the shape of the outputs, and the gradients that arrive at ``observed`` operations.

    The backward pass starts with :func:`own_seed`.

    Args:
        loss: one number, or one for each row of a single boundary.
        boundaries: where outputs meet the loss.
        samples: N, of each boundary.
        scaling: how the reported loss is made of its samples.
        observed: for each boundary an operation whose incoming gradient is wanted, or None.
        twice: whether the gradients will be differentiated again.
        verified: whether ``twice`` has worked for this loss before.

    Raises:
        SinglePassError: the backward that torch.compile has made can run once, and the user needs it. Nothing has been
            computed then, and the graph is as it was.
    """
    seed = own_seed(loss, samples, scaling)
    cause = ""
    try:
        passed = _differentiate(loss, seed, boundaries, observed, twice)
    except (torch.OutOfMemoryError, SinglePassError):
        raise
    except RuntimeError as error:
        if not twice:
            raise
        passed, cause = _differentiate(loss, seed, boundaries, observed, False), first_line(error)
    if twice and not verified and passed.changed():  # waits for the device
        cause = "a hook on the outputs changes their gradient, and would change the Hessian's columns as well"
    gradients, upstream = [], passed.upstream
    for k, (value, boundary, n) in enumerate(zip(passed.gradients(), boundaries, samples, strict=True)):
        factor = n / seed if scaling == "mean" and n != seed else 1.0
        if value is None:
            gradients.append(torch.zeros(boundary.shape, dtype=boundary.dtype, device=boundary.device))
        else:
            gradients.append(value if factor == 1 else value * factor)
        arrived = upstream[k]
        if arrived is not None and factor != 1:
            upstream[k] = arrived * factor
    return Gradients(gradients, upstream, passed.sent, seed, cause)


def own_seed(loss: Tensor, samples: Sequence[int], scaling: Scaling) -> int:
    """What a backward pass over this loss begins with, so that gradients have the scale of ``g_i`` on their way.

    For a mean it is N. A multiplication by N afterwards would come too late: in float16 the gradients of a mean
    underflow. Arguments as :func:`loss_gradients`.
    """
    seed = max(samples) if scaling == "mean" else 1
    if loss.dtype in (torch.float16, torch.bfloat16):
        seed = min(2 ** max(seed, 1).bit_length() // 2, 1024)  # a power of two: exact in a few bits of mantissa
    return seed


def own_parts(
    loss: Tensor, boundaries: Sequence[Boundary], observed: Sequence[Node | None]
) -> tuple[Parts, list[Tensor | None]]:
    """What the loss alone sends to its boundaries for a loss gradient of 1, and what arrives at ``observed``.

    Raises:
        SinglePassError: see :func:`loss_gradients`.
    """
    # The pass ends above the consumers, which are called by hand: a hook that a user has on the outputs does not fire.
    nodes = {node: None for boundary in boundaries for node, _ in boundary.consumers}
    nodes.update((node, None) for node in observed if node is not None)
    if any("CompiledFunction" in node.name() for node in nodes):
        raise SinglePassError("called by hand, a compiled backward gives its buffers away")
    edges = [(node, index) for node in nodes for index in range(len(node._input_metadata))]  # type: ignore[attr-defined]
    with torch.enable_grad(), past_fabrics_guard(), _naming_donated_buffers():
        into = torch.autograd.grad(
            loss, [GradientEdge(*edge) for edge in edges], torch.ones_like(loss), retain_graph=True, allow_unused=True
        )
    arrived = dict(zip(edges, into, strict=True))
    with torch.no_grad():
        parts = [[_sent_by(node, positions, arrived) for node, positions in b.consumers] for b in boundaries]
    return parts, [None if node is None else arrived[node, 0] for node in observed]


def _sent_by(node: Node, positions: Sequence[int], arrived: Mapping[Edge, Tensor | None]) -> list[Tensor | None]:
    """What one operation makes of what arrives at it."""
    into = [arrived[node, index] for index in range(len(node._input_metadata))]  # type: ignore[attr-defined]
    if all(grad is None for grad in into):
        return [None] * len(positions)
    sent: Any = node.apply(*into) if isinstance(node, BackwardCFunction) else node(*into)  # type: ignore[operator]
    sent = sent if isinstance(sent, tuple) else (sent,)
    return [sent[position] for position in positions]


@contextmanager
def _naming_donated_buffers() -> Iterator[None]:
    """Inside, torch's error about a backward that can run only once says what to do."""
    try:
        yield
    except RuntimeError as error:
        if "donated buffers" in str(error):
            raise SinglePassError(
                "torch.compile has made a backward of this loss that runs once (donated buffers): there is no double "
                "backward through it, and no pass of its own for a step that needs one. Compile the network and not "
                "the loss, or set torch._functorch.config.donated_buffer = False before it is compiled."
            ) from error
        raise


@dataclass
class _Pass:
    """What one pass over a loss has brought.

    Attributes:
        returned: what autograd returned for each boundary.
        sent: what the consumers sent.
        upstream: what arrived at the observed operations.
    """

    returned: Sequence[Tensor | None]
    sent: Parts
    upstream: list[Tensor | None]

    def gradients(self) -> list[Tensor | None]:
        """Of each boundary, as the loss's own operations sent it.

        What autograd returns for the boundary has passed the hooks that a user may have put on that tensor: they fire
        in every backward pass. They belong below the loss and see the step later.
        """
        return [r if s is None else s for r, s in zip(self.returned, map(_total, self.sent), strict=True)]

    def changed(self) -> bool:
        """Whether such hooks have changed what autograd returned."""
        pairs = [(r, s) for r, s in zip(self.returned, map(_total, self.sent), strict=True)]
        return any(
            r is not None and s is not None and not torch.allclose(r, s, rtol=1e-3, equal_nan=True) for r, s in pairs
        )


def _total(parts: Sequence[Sequence[Tensor | None]]) -> Tensor | None:
    """The sum of what the consumers of one boundary sent; None if they sent nothing."""
    total: Tensor | None = None
    for part in (part for consumer in parts for part in consumer):
        if part is not None:
            total = part if total is None else total + part
    return total


def _differentiate(
    loss: Tensor,
    seed: float,
    boundaries: Sequence[Boundary],
    observed: Sequence[Node | None],
    create_graph: bool,
) -> _Pass:
    """``seed * d loss / d boundary``."""
    sent: Parts = [[[None] * len(positions) for _, positions in b.consumers] for b in boundaries]
    upstream: list[Tensor | None] = [None] * len(boundaries)

    def record_sent(parts: list[Tensor | None], positions: Sequence[int]) -> Callable[[Any, Any], None]:
        def hook(grad_inputs: tuple[Tensor | None, ...], _: Any) -> None:
            parts[:] = [grad_inputs[position] for position in positions]

        return hook

    def record_arrived(which: int) -> Callable[[Any, Any], None]:
        def hook(_: Any, grad_outputs: tuple[Tensor | None, ...]) -> None:
            upstream[which] = grad_outputs[0]

        return hook

    handles = [
        node.register_hook(record_sent(sent[which][number], positions))
        for which, boundary in enumerate(boundaries)
        for number, (node, positions) in enumerate(boundary.consumers)
    ]
    handles += [node.register_hook(record_arrived(which)) for which, node in enumerate(observed) if node is not None]
    try:
        with torch.enable_grad(), past_fabrics_guard(), _naming_donated_buffers():
            returned = torch.autograd.grad(
                loss,
                [b.edge for b in boundaries],
                torch.full_like(loss, seed),
                retain_graph=True,
                create_graph=create_graph,
                allow_unused=True,
            )
    finally:
        for handle in handles:
            handle.remove()
    return _Pass(returned, sent, upstream)


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
