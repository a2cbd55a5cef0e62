"""What parameters and layers are called, for messages and for the keys of running states."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.autograd.graph import Node

from newton_plugin._boundary.autograd_graph import children, is_leaf, operation
from newton_plugin._boundary.layers import Layers

__all__ = ["layer_name", "parameter_names"]

_WRAPPERS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))


def parameter_names(module: nn.Module) -> dict[int, str]:
    """A module's parameters by their ids, named without the parts that torch.compile, FSDP and checkpointing add.

    So a state fits with and without these wrappers.
    """
    return {
        id(p): ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        for name, p in module.named_parameters()
    }


def layer_name(node: Node, parameters: Mapping[int, str], layers: Layers) -> str | None:
    """The layer whose operation a node is, "head" for the parameter "head.weight"; a leaf's own name; None: unknown."""
    if is_leaf(node):
        return parameters.get(id(node.variable))  # type: ignore[attr-defined]
    inputs = list(children(node))
    # A compiled network is one operation; its last parameters are those of its last layer.
    for child, _ in reversed(inputs) if operation(node) == "CompiledFunction" else inputs:
        if layers.is_parameter(child):
            leaf = child
            while not is_leaf(leaf):
                leaf = next(children(leaf))[0]
            parameter = parameters.get(id(leaf.variable))  # type: ignore[attr-defined]
            if parameter is not None:
                return parameter.rpartition(".")[0] or parameter
    return None
