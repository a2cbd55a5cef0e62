"""The parameters of the two levels: as the user gives them, and as groups of one ``torch.optim.Optimizer``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from newton_plugin._errors import ArgumentError, ArgumentTypeError

__all__ = ["check_disjoint", "level_groups", "tensors_of"]


def tensors_of(name: str, params: Iterable[Tensor]) -> list[Tensor]:
    """The tensors of an iterable (a generator too), or of ``named_parameters()``."""
    tensors: list[Any] = [p[1] if isinstance(p, tuple) and len(p) == 2 else p for p in _listed(name, params)]
    for p in tensors:
        if not isinstance(p, Tensor):
            raise ArgumentTypeError(f"{name} must hold tensors; got {type(p).__name__} among them.")
        if not p.requires_grad:
            raise ArgumentError(
                f"{name} holds a tensor of shape {tuple(p.shape)} that does not require grad. Call "
                ".requires_grad_() on it, or leave it out."
            )
    if len({id(p) for p in tensors}) < len(tensors):
        raise ArgumentError(f"{name} names the same tensor twice; each may be there once.")
    return tensors


def level_groups(level: str, name: str, params: Any) -> list[dict[str, Any]]:
    """Parameter groups ``{"params": [...], "level": level, ...}`` from tensors, names and tensors, or groups."""
    items = _listed(name, params)
    if not all(isinstance(item, dict) for item in items):
        items = [{"params": items}]
    groups = []
    for item in items:
        if "params" not in item:
            raise ArgumentError(f"{name}: a parameter group needs the key 'params'; got the keys {sorted(item)}.")
        held = item["params"]
        held = [held] if isinstance(held, Tensor) else list(held)
        groups.append({**item, "params": held, "level": level})
    return groups


def _listed(name: str, params: Any) -> list[Any]:
    if isinstance(params, Tensor):
        raise ArgumentTypeError(f"{name} must be an iterable of tensors; got one tensor. Write [{name}].")
    if isinstance(params, (str, bytes)) or not isinstance(params, Iterable):
        raise ArgumentTypeError(f"{name} must be an iterable of tensors; got {type(params).__name__}.")
    items = list(params)
    if not items:
        raise ArgumentError(
            f"{name} is empty. A generator that was used up by an earlier call, such as model.parameters(), "
            "must be made anew."
        )
    return items


def check_disjoint(upper: Sequence[Tensor], lower: Sequence[Tensor]) -> None:
    """Raise if a tensor belongs to both levels."""
    shared = {id(p) for p in upper} & {id(p) for p in lower}
    if shared:
        raise ArgumentError(
            f"{len(shared)} tensor(s) are in upper_params and in lower_params. A parameter belongs to one level: "
            "the lower loss determines lower_params, upper_params are what is learned above it."
        )
