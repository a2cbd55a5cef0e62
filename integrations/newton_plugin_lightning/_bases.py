"""One callback for two class trees.

Lightning ships twice: as ``pytorch_lightning`` and as ``lightning.pytorch``. The code is the same, the classes are not:
a Trainer of one tree refuses the other tree's callbacks. A class that inherits *every installed* ``Callback`` is
accepted by both, so that no user has to choose.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from newton_plugin import NewtonPluginError

__all__ = ["TREES", "CallbackBase", "LightningMissingError", "first_tree", "installed_callbacks"]

TREES = ("pytorch_lightning", "lightning.pytorch")


class LightningMissingError(NewtonPluginError, ImportError):
    """Neither ``pytorch_lightning`` nor ``lightning`` is installed."""


def _is_absent(tree: str, error: ModuleNotFoundError) -> bool:
    """True if ``tree`` itself is not installed; False if it is, but something *it* imports is missing."""
    return error.name is not None and (tree == error.name or tree.startswith(error.name + "."))


def _callback_of(tree: str) -> type | None:
    try:
        return importlib.import_module(tree).Callback
    except ModuleNotFoundError as error:
        if _is_absent(tree, error):
            return None
        raise


def installed_callbacks() -> tuple[type, ...]:
    """The ``Callback`` base class of every installed tree, in the order of :data:`TREES`."""
    bases = [base for tree in TREES if (base := _callback_of(tree)) is not None]
    if not bases:
        raise LightningMissingError(
            "newton_plugin_lightning needs pytorch_lightning or lightning, and neither is installed. "
            "Install one: pip install 'newton-plugin[lightning]'."
        )
    return tuple(bases)


def first_tree() -> str:
    """The import name of the tree that the command line runs on: the first of :data:`TREES` installed."""
    return installed_callbacks()[0].__module__.rsplit(".callbacks", 1)[0]


if TYPE_CHECKING:
    from pytorch_lightning import Callback as CallbackBase
else:
    CallbackBase = type("CallbackBase", installed_callbacks(), {"__doc__": "Every installed Callback base."})
