"""Where the model's outputs meet the loss: three ways to find out.

* :class:`GraphCut` reads it off the autograd graph: the first operations, seen from the loss, that own
  parameters. Everything parameter-free after them is the loss. Nothing to configure.
* :class:`ModuleOutput` takes what a named submodule returned.
* :class:`LossCall` takes what a named loss (a submodule, a method, a function of ``torch.nn.functional``)
  was called with.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.overrides import TorchFunctionMode

from newton_plugin._errors import ArgumentError
from newton_plugin._graph import (
    Boundary,
    Edge,
    LossGraph,
    children,
    edge_shape,
    explore,
    is_leaf,
    make_boundary,
    operation,
    upstream_edges,
)

__all__ = ["BoundaryFinder", "Cut", "GraphCut", "LossCall", "ModuleOutput", "boundaries_at", "tensors_in"]

# Operations whose output holds the same numbers as their input: the loss may as well begin after them.
_SAME_NUMBERS = frozenset(("Alias", "Clone", "Expand", "Permute", "ReshapeAlias", "Select", "Slice", "Squeeze")) | {
    *("T", "ToCopy", "Transpose", "UnsafeView", "Unsqueeze", "View")
}
_PRODUCTS = frozenset(("Mm", "Bmm", "Mv"))
_TRANSPOSITIONS = frozenset(("Permute", "T", "Transpose"))
_JOINS = frozenset(["Cat", "Stack"])
# Operations that mix parameters with data, or pick from parameters by data, however the shapes look.
_LAYERS = (
    *("mm", "mv", "conv", "batchnorm", "layernorm", "groupnorm", "rmsnorm", "rnn", "lstm", "gru", "attention"),
    *("embedding", "index", "gather"),
)


@dataclass
class Cut:
    """What a finder found under one loss.

    Attributes:
        boundaries: where to take the step.
        dropped: what was passed over, and why, in words.
        seen: what the graph holds, in words, for the error where nothing was found.
        preconditioned: some of the loss carries a Newton step of its own already.
    """

    boundaries: list[Boundary]
    dropped: list[str] = field(default_factory=list)
    seen: str = ""
    preconditioned: bool = False


class BoundaryFinder(Protocol):
    """From a loss to its boundaries."""

    def __call__(self, loss: Tensor) -> Cut: ...

    def watch(self) -> Any:
        """A context manager around the forward pass and the computation of the loss."""
        ...

    def attach(self, module: nn.Module) -> None:
        """Register on ``module`` what the finder needs."""
        ...

    def detach(self) -> None:
        """Remove it again."""
        ...


class GraphCut:
    """The boundary by the autograd graph alone.

    Views, casts and the stacking of several outputs after the last layer belong to the model: the boundary has the
    shape that the loss sees. Terms that depend on parameters only (weight decay written into the loss) are not
    outputs and are left alone.
    """

    def __init__(self) -> None:
        self._names: dict[int, str] = {}

    def attach(self, module: nn.Module) -> None:
        """Take the names of ``module``'s parameters, for messages and states."""
        self._names = {id(p): name for name, p in module.named_parameters()}

    def detach(self) -> None:
        """Forget them."""
        self._names = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Nothing to watch."""
        yield

    def __call__(self, loss: Tensor) -> Cut:
        root = loss.grad_fn
        assert root is not None
        kinds: dict[Node, bool] = {}

        def skip(node: Node) -> bool:
            known = kinds.get(node)
            return _parameter_only(node, kinds) if known is None else known

        def stop(edge: Edge) -> bool:
            return _owns_parameters(edge[0], kinds) and len(edge_shape(edge)) > 0

        graph = explore(root, stop, skip)
        named = {edge: self._name(edge, kinds, k) for k, edge in enumerate(graph.stops)}
        if not named and not graph.preconditioned:
            # Parameters all the way up: outputs that are themselves the one thing being optimised.
            leaves = explore(root, lambda edge: is_leaf(edge[0]))
            if len(leaves.stops) == 1 and edge_shape(leaves.stops[0]):
                graph = leaves
                named = {leaves.stops[0]: self._names.get(id(_variable(leaves.stops[0][0])), "leaf")}
            else:
                return Cut([], seen=_describe(leaves))
        edges = _towards_loss(named, graph)
        already = _edges_below(graph.preconditioned, stop, skip)
        return boundaries_at(edges, graph, already)

    def _name(self, edge: Edge, kinds: dict[Node, bool], number: int) -> str:
        """The layer that owns the boundary: "head.weight" -> "head"."""
        for child, _ in children(edge[0]):
            if _parameter_only(child, kinds):
                leaf = child
                while not is_leaf(leaf):
                    leaf = next(children(leaf))[0]
                parameter = self._names.get(id(_variable(leaf)))
                if parameter is not None:
                    return parameter.rpartition(".")[0] or parameter
        return f"output{number}"


def _variable(leaf: Node) -> Tensor:
    return leaf.variable  # type: ignore[attr-defined]


def _parameter_only(node: Node, known: dict[Node, bool]) -> bool:
    """Whether a tensor was computed from parameters and constants alone: a transposed weight, a weight norm,
    a penalty; not what a layer made of parameters and data (which do not require grad, like constants).

    Depth first, without recursion (graphs are deeper than Python's stack). One ancestor that saw data settles
    everything computed from it, and a layer always has: a walk ends at the first one it meets.
    """
    if node in known:
        return known[node]
    stack = [(node, children(node))]
    while stack:
        current, rest = stack[-1]
        verdict = None
        if current not in known and (is_leaf(current) or _is_layer(current)):
            verdict = is_leaf(current)
        else:
            child = next((c for c, _ in rest if not known.get(c, False)), None)
            if child is None:
                verdict = _made_of_parameters(current)
            elif child in known:
                verdict = False
            else:
                stack.append((child, children(child)))
        if verdict is not None:
            known[current] = verdict
            stack.pop()
            if not verdict:
                known.update((user, False) for user, _ in stack)
                stack.clear()
    return known[node]


def _is_layer(node: Node) -> bool:
    """Operations that stand for a layer applied to data; a bare matrix product may also be of two parameters."""
    return _is_layer_name(node.name())


@functools.cache
def _is_layer_name(name: str) -> bool:
    return any(word in name.lower() for word in _LAYERS) and name.split("Backward")[0] not in _PRODUCTS


def _made_of_parameters(node: Node) -> bool:
    """The same for one node, all of whose inputs that require grad are made of parameters."""
    inputs = list(children(node))
    if not inputs:
        return False
    if all(child is not None for child, _ in node.next_functions):
        return True
    if operation(node) in _PRODUCTS:
        return False  # the other factor is data
    shape = edge_shape((node, 0))
    return shape == torch.broadcast_shapes(*(edge_shape(edge) for edge in inputs))


def _owns_parameters(node: Node, known: dict[Node, bool]) -> bool:
    if is_leaf(node):
        return False
    for child, _ in node.next_functions:
        if child is not None:
            own = known.get(child)
            if own or (own is None and _parameter_only(child, known)):
                return True
    return False


def _towards_loss(named: Mapping[Edge, str], graph: LossGraph) -> dict[Edge, str]:
    """Move each edge over the operations that only reshape, cast, or stack it with other edges."""
    edges = dict(named)
    moved = True
    while moved:
        moved = False
        for edge, name in list(edges.items()):
            after = _next_edge(edge, edges, graph) if edge in edges else None
            if after is None:
                continue
            for child in children(after[0]):
                edges.pop(child, None)
            edges[after] = name
            moved = True
    return edges


def _next_edge(edge: Edge, edges: Mapping[Edge, str], graph: LossGraph) -> Edge | None:
    users = graph.consumers.get(edge, [])
    if len(users) != 1:
        return None
    node = users[0][0]
    after = (node, 0)
    if after not in graph.consumers or not edge_shape(after):
        return None  # the loss itself, or no longer a batch
    inputs = list(children(node))
    if operation(node) in _JOINS:
        whole = len(inputs) == len(node.next_functions) and all(
            i in edges and len(graph.consumers[i]) == 1 for i in inputs
        )
        return after if whole else None
    if operation(node) in _SAME_NUMBERS and len(inputs) == 1:
        if math.prod(edge_shape(after)) != math.prod(edge_shape(edge)):
            return None
        # A transposition may be the loss's own (time first for CTC): the samples stay where they are. Recurrent
        # layers are the exception: they transpose to batch-first themselves.
        moves_samples = operation(node) in _TRANSPOSITIONS and edge_shape(after)[0] != edge_shape(edge)[0]
        return None if moves_samples and not _is_recurrent(edge[0]) else after
    return None


def _edges_below(roots: Sequence[Node], stop: Callable[[Edge], bool], skip: Callable[[Node], bool]) -> int:
    """How many boundaries are reached through losses that already carry a step."""
    return sum(len(explore(root, stop, skip).stops) for root in roots)


def _is_recurrent(node: Node) -> bool:
    return any(word in operation(node).lower() for word in ("rnn", "lstm", "gru"))


def boundaries_at(edges: Mapping[Edge, str], graph: LossGraph, already: int = 0) -> Cut:
    """Make boundaries of edges; of nested ones keep those nearest the loss."""
    cut = Cut([], seen=_describe(graph), preconditioned=already > 0 or bool(graph.preconditioned))
    nested: set[Edge] = set()
    if len(edges) > 1:
        for edge in edges:
            nested |= upstream_edges(edge, [e for e in edges if e != edge])
    for edge, name in edges.items():
        what = f"{name!r} (shape {edge_shape(edge)})"
        if edge in nested:
            cut.dropped.append(f"{what}: another boundary nearer the loss is computed from it")
        elif not graph.consumers.get(edge):
            cut.dropped.append(f"{what}: the loss does not use it directly")
        else:
            cut.boundaries.append(make_boundary(name, edge, graph.consumers))
    return cut


def _describe(graph: LossGraph, limit: int = 12) -> str:
    """The operations nearest the loss."""
    names = [operation(node) or node.name() for node in graph.nodes]
    more = f", … ({len(names) - limit} more)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors that require grad in nested tuples, lists, dicts and dataclasses."""
    if isinstance(value, Tensor):
        if value.requires_grad and value.is_floating_point() and value.ndim > 0:
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        for name in value.__dataclass_fields__:
            yield from tensors_in(getattr(value, name))


class _Recorder:
    """Collects gradient edges by name during a forward pass."""

    # Edges keep their graph alive; a forward pass whose loss never comes must not do so for ever.
    _LIMIT = 256

    def __init__(self) -> None:
        self.recorded: dict[Edge, str] = {}

    def record(self, name: str, value: Any) -> None:
        if not torch.is_grad_enabled():
            return
        for tensor in tensors_in(value):
            edge = get_gradient_edge(tensor)
            self.recorded.setdefault((edge.node, edge.output_nr), name)
        while len(self.recorded) > self._LIMIT:
            self.recorded.pop(next(iter(self.recorded)))

    def cut(self, loss: Tensor) -> Cut:
        """The recorded edges that ``loss`` was computed from; forgets all of them."""
        recorded, self.recorded = self.recorded, {}
        assert loss.grad_fn is not None
        graph = explore(loss.grad_fn, recorded.__contains__)
        cut = boundaries_at({edge: recorded[edge] for edge in graph.stops}, graph)
        if recorded and not cut.boundaries:
            names = ", ".join(sorted({repr(n) for n in recorded.values()}))
            cut.seen += f"; outputs recorded from {names}, none of which the loss was computed from"
        elif not recorded:
            cut.seen += "; nothing recorded: the named part was not called since the last step"
        return cut


class _SubmoduleHook:
    """A forward hook that never travels with a copy of the module it sits on."""

    def __init__(self, finder: _Recorder, name: str) -> None:
        self.finder = finder
        self.name = name
        self._inputs: Any = ()

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._inputs = _Recorder()
        self._inputs.record(self.name, (args, kwargs))

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 0:  # a loss: what went in is the boundary
            self.finder.recorded.update(self._inputs.recorded)
        else:
            self.finder.record(self.name, output)
        self._inputs = ()


class _Detachable:
    """A hook function that deep-copies and pickles as one that does nothing."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> None:
        self.function(*args)

    def __deepcopy__(self, memo: Any) -> Any:
        return _inert

    def __reduce__(self) -> Any:
        return _get_inert, ()


def _inert(*args: Any) -> None:
    """What is left of a hook in a copy."""


def _get_inert() -> Any:
    return _inert


class ModuleOutput:
    """What the submodule ``name`` returned; what it was called with, if it returned a loss.

    Raises:
        ArgumentError: on :meth:`attach`, if there is no such submodule.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._recorder = _Recorder()
        self._handles: list[Any] = []

    def attach(self, module: nn.Module) -> None:
        """Register two forward hooks on the submodule."""
        self.detach()
        target = dict(module.named_modules()).get(self.name)
        if target is None:
            raise ArgumentError(no_such_name(self.name, module))
        hook = _SubmoduleHook(self._recorder, self.name)
        self._handles = [
            target.register_forward_pre_hook(_Detachable(hook.before), with_kwargs=True),  # type: ignore[arg-type]
            target.register_forward_hook(_Detachable(hook.after), with_kwargs=True),  # type: ignore[arg-type]
        ]

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._recorder.recorded = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Forget what an earlier forward pass left, then let the hooks record."""
        self._recorder.recorded = {}
        yield

    def __call__(self, loss: Tensor) -> Cut:
        return self._recorder.cut(loss)


class LossCall:
    """What the loss ``name`` was called with, where it is a method of the module or a function of
    ``torch.nn.functional``. It listens inside :meth:`watch` only.

    Raises:
        ArgumentError: on :meth:`attach`, if ``name`` is neither.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._recorder = _Recorder()
        self._module: nn.Module | None = None

    def attach(self, module: nn.Module) -> None:
        """Remember the module whose method it is."""
        if not callable(getattr(module, self.name, None)) and not is_functional(self.name):
            raise ArgumentError(no_such_name(self.name, module))
        self._module = module

    def detach(self) -> None:
        """Forget it."""
        self._module = None
        self._recorder.recorded = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Record the calls made inside."""
        self._recorder.recorded = {}
        with ExitStack() as stack:
            if self._module is not None and callable(getattr(self._module, self.name, None)):
                stack.enter_context(self._listening_method(self._module))
            else:
                stack.enter_context(_Listening(self.name, self._recorder))
            yield

    @contextmanager
    def _listening_method(self, module: nn.Module) -> Iterator[None]:
        own = module.__dict__
        before = {self.name: own[self.name]} if self.name in own else {}
        original = getattr(module, self.name)

        def listening(*args: Any, **kwargs: Any) -> Any:
            self._recorder.record(self.name, (args, kwargs))
            return original(*args, **kwargs)

        own[self.name] = listening
        try:
            yield
        finally:
            own.pop(self.name, None)
            own.update(before)

    def __call__(self, loss: Tensor) -> Cut:
        return self._recorder.cut(loss)


class _Listening(TorchFunctionMode):
    """Records the inputs of one function of ``torch.nn.functional``."""

    def __init__(self, name: str, recorder: _Recorder) -> None:
        super().__init__()
        self._function = getattr(F, name)
        self._name, self._recorder = name, recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is self._function:
            self._recorder.record(self._name, (args, kwargs))
        return func(*args, **(kwargs or {}))


def is_functional(name: str) -> bool:
    """Whether ``name`` is a function of ``torch.nn.functional``."""
    return not name.startswith("_") and inspect.isroutine(getattr(F, name, None))


def no_such_name(name: str, module: nn.Module) -> str:
    """A message that lists what could have been meant."""
    names = [n for n, _ in module.named_modules() if n]
    shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    return (
        f"boundary={name!r} names neither a submodule nor a method of {type(module).__name__}, nor a function of "
        f"torch.nn.functional. Its submodules: {shown or 'none'}. boundary='auto' needs no name."
    )
