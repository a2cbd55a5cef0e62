"""What ``boundary=`` means: one finder for "auto", one for each name otherwise, all asked together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from newton_plugin._boundary.autograd_graph import is_preconditioned
from newton_plugin._boundary.beside import beside, names_of
from newton_plugin._boundary.by_graph import GraphFinder
from newton_plugin._boundary.by_name import LossCall, ModuleOutput
from newton_plugin._boundary.finder import BoundaryFinder, Cut
from newton_plugin._boundary.names import parameter_names
from newton_plugin._errors import ArgumentError, ArgumentTypeError

__all__ = ["BoundarySearch"]


class BoundarySearch:
    """Finds the boundaries that a user asked for by ``boundary=``.

    Args:
        boundary: "auto", a name or a list of names; see :class:`newton_plugin.LossHook`.

    Raises:
        ArgumentError, ArgumentTypeError: ``boundary`` is something else.
    """

    def __init__(self, boundary: str | Sequence[str]) -> None:
        self.boundary = boundary
        self._names = _check_boundary(boundary)
        self.finders: list[BoundaryFinder] = [] if self._names else [GraphFinder()]
        self._parameters: dict[int, str] = {}

    def attach(self, module: nn.Module) -> None:
        """Register on ``module`` what the finders need. Names mean something only from now on.

        Raises:
            ArgumentError: the module has no part of that name.
        """
        self.detach()
        if self._names:
            submodules = dict(module.named_modules())
            self.finders = [ModuleOutput(n) if n in submodules else LossCall(n) for n in self._names]
        try:
            for finder in self.finders:
                finder.attach(module)
        except ArgumentError:
            self.detach()
            raise
        self._parameters = parameter_names(module)

    def detach(self) -> None:
        """Remove everything that :meth:`attach` registered."""
        for finder in self.finders:
            finder.detach()
        self._parameters = {}
        if self._names:
            self.finders = []

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Around the forward pass and the computation of the loss: what names need is recorded inside."""
        with ExitStack() as stack:
            for finder in self.finders:
                stack.enter_context(finder.watch())
            yield

    def leaves_alone(self, loss: Tensor) -> bool:
        """Whether the loss is not to be searched: it already takes a Newton step, and no name asks for another."""
        assert loss.grad_fn is not None
        return not self._names and is_preconditioned((loss.grad_fn, loss.output_nr))

    def __call__(self, loss: Tensor) -> Cut:
        """The boundaries of all finders, each once.

        Raises:
            ArgumentError: names, and no module.
        """
        if not self.finders:
            raise ArgumentError(
                f"boundary={self.boundary!r} names a part of the model, which the hook does not know. "
                "Pass it: LossHook(..., module=model)."
            )
        if not self._names:
            return self.finders[0](loss)
        assert loss.grad_fn is not None
        cuts = [finder(loss) for finder in self.finders]
        boundaries = list({b.graph_edge: b for cut in cuts for b in cut.boundaries}.values())
        return Cut(
            boundaries,
            left_out=[words for cut in cuts for words in cut.left_out],
            beside=names_of(beside(loss.grad_fn, boundaries), self._parameters),
            description="; ".join(cut.description for cut in cuts),
            preconditioned=any(cut.preconditioned for cut in cuts),
        )


def _check_boundary(boundary: Any) -> list[str]:
    """The names in ``boundary``; none for "auto"."""
    names = [boundary] if isinstance(boundary, str) else boundary
    if not isinstance(names, Sequence) or not all(isinstance(n, str) for n in names):
        raise ArgumentTypeError(f"boundary must be a name or a list of names; got {boundary!r}.")
    if not names or not all(names):
        raise ArgumentError(f"boundary must be 'auto' or name at least one part of the model; got {boundary!r}.")
    if "auto" in names and len(names) > 1:
        raise ArgumentError(f"boundary='auto' stands alone; got {boundary!r}.")
    return [] if names[0] == "auto" else list(names)
