"""What is to be said about the boundaries that were found: in words, as errors or as warnings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from newton_plugin._boundary.autograd_graph import is_output_of_fsdp1, reduction_of
from newton_plugin._boundary.finder import Cut
from newton_plugin._boundary.search import BoundarySearch
from newton_plugin._errors import NoBoundaryError
from newton_plugin._step.settings import RuleSettings

__all__ = ["doubts", "find", "nothing_found", "refuse_fsdp1", "refuse_unusable", "shared_late"]

_NOT_FOUND = "Name the submodule that makes the outputs, boundary='head', or wrap the loss function by npl.newton_loss."
_COMPILED = (
    "torch.compile has made one operation of network and loss, and the outputs between them are not to be seen. "
    "Compile the network and not the loss, model = torch.compile(model), or wrap the loss function by npl.newton_loss "
    "before the whole is compiled."
)


def find(
    search: BoundarySearch, loss: Tensor, settings: RuleSettings, first: bool, report: Callable[[str], None]
) -> Cut:
    """The boundaries of a loss. What is doubtful about them is reported; what cannot be used is an error.

    Args:
        search: what was asked for.
        loss: with its graph.
        settings: of the hook.
        first: whether the hook has found nothing yet. A later loss may have no boundaries.
        report: gets each doubt, in words.
    """
    cut = search(loss)
    refuse_unusable(cut)
    for message in doubts(cut, loss, settings):
        report(message)
    if cut.preconditioned:
        return replace(cut, boundaries=[])
    if first and not cut.boundaries:
        raise nothing_found(cut, loss, search.boundary)
    if first:
        refuse_fsdp1(cut)
    return cut


def refuse_unusable(cut: Cut) -> None:
    """Raise where a step at what was found would be wrong."""
    if cut.hidden:
        raise NoBoundaryError(
            f"{', '.join(cut.hidden)} lies between the outputs that were found and the loss, and holds parameters "
            "that the autograd graph does not show: whether outputs end inside cannot be seen. A checkpoint: pass "
            "use_reentrant=False. A scripted function or an autograd.Function with network and loss in one: wrap the "
            "loss function by npl.newton_loss, or name the submodule that makes the outputs, boundary='head'."
        )
    if cut.nested:
        raise NoBoundaryError(
            f"one output of the model was computed from another, and both reach the loss: {'; '.join(cut.nested)}. "
            "A step at one of them alone would be wrong, and where they meet no step can be taken. Name the "
            "submodule that makes the outputs, boundary='head', or wrap the loss function by npl.newton_loss."
        )


def refuse_fsdp1(cut: Cut) -> None:
    """Raise where the outputs are what torch's first FSDP returned."""
    if any(is_output_of_fsdp1(b.graph_edge) for b in cut.boundaries):
        raise NoBoundaryError(
            "the outputs come straight from FullyShardedDataParallel, whose hook on them takes the curvature's "
            "backward pass for the network's. Give the loss a copy, loss_fn(model(x).clone(), ...), or use "
            "torch.distributed.fsdp.fully_shard (FSDP2), which needs nothing."
        )


def nothing_found(cut: Cut, loss: Tensor, boundary: str | Sequence[str]) -> NoBoundaryError:
    """The error where a loss has no boundary."""
    left_out = f" Left out: {'; '.join(cut.left_out)}." if cut.left_out else ""
    return NoBoundaryError(
        f"boundary={boundary!r} found no outputs under the loss (value of shape {tuple(loss.shape)}). "
        f"Seen from the loss: {cut.description}.{left_out} "
        + (_COMPILED if "CompiledFunction" in cut.description else _NOT_FOUND)
    )


def doubts(cut: Cut, loss: Tensor, settings: RuleSettings) -> Iterator[str]:
    """What a user should know of what was found, a sentence or two for each."""
    assert loss.grad_fn is not None
    reduction = reduction_of(loss.grad_fn)
    if reduction is not None and reduction != settings.reduction:
        yield (
            f"newton_plugin takes this loss for the {settings.reduction} over the samples, but it was "
            f"computed with reduction={reduction!r}. Give the same to newton_plugin: reduction={reduction!r}."
        )
    for words in cut.parts:
        yield (
            f"newton_plugin counts rows as samples, but this loss seems to take several rows as one: {words}. Steps "
            "are then of another size than for a batch of such samples. Pad them to one batch, with mask= for the "
            "ranking losses; or wrap the loss of one part, or of the padded batch, by npl.newton_loss."
        )
    for words in cut.left_out:
        yield f"newton_plugin leaves one boundary out: {words}."
    if settings.feature_dims is not None and cut.transposed:
        yield (
            f"newton_plugin counts feature_dims={settings.feature_dims} on the outputs as the loss sees "
            f"them, after a transposition: {'; '.join(cut.transposed)}. If you meant the shape before it, name the "
            "submodule that makes the outputs, boundary='head'; if you meant the shape after it, name the loss."
        )
    if cut.preconditioned and cut.boundaries:
        yield (
            "newton_plugin: a part of this loss already takes a Newton step of its own; the rest of it keeps its "
            "plain gradient. Wrap the whole loss, or none of it."
        )


def shared_late(unnoticed: int) -> str:
    """What is to be said where another term began to share the loss's operations after some steps."""
    return (
        "newton_plugin: another term of the backward pass uses operations of the hooked loss, and did not at first. At "
        f"up to {unnoticed} steps its gradient may have been taken for the loss's own; from now on the two are kept "
        "apart."
    )
