"""Which Lightning a module belongs to: with both installed, the Trainer must be of the module's own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from newton_plugin_lightning._bases import TREES, first_tree

__all__ = ["configured_tree", "tree_of"]


def tree_of(kind: type) -> str | None:
    """The tree whose ``LightningModule`` a class inherits, or None."""
    loaded = [tree for tree in TREES if sys.modules.get(tree) is not None]
    return next((tree for tree in loaded if issubclass(kind, importlib.import_module(tree).LightningModule)), None)


def configured_tree(args: Sequence[str]) -> str:
    """The tree of the module class that a command line names; the first one installed where it names none.

    What cannot be read or imported here is left for the command line itself, which says what is wrong.
    """
    for name in reversed(list(_named_models(args))):
        module, _, attribute = name.rpartition(".")
        try:
            kind = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError):
            continue
        tree = tree_of(kind) if isinstance(kind, type) else None
        if tree is not None:
            return tree
    return first_tree()


def _named_models(args: Sequence[str]) -> Iterator[str]:
    """Class paths in the order of the arguments; later ones count."""
    for argument, after in zip(args, [*args[1:], ""], strict=False):
        option, equals, value = argument.partition("=")
        value = value if equals else after
        if option in ("--config", "-c", "--model") and Path(value).suffix in (".yaml", ".yml", ".json"):
            yield from _in_file(value, ("model",) if option != "--model" else ())
        elif option in ("--model", "--model.class_path"):
            yield value


def _in_file(path: str, keys: tuple[str, ...]) -> Iterator[str]:
    try:
        found: Any = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return
    for top in (found, found.get("fit") if isinstance(found, dict) else None):
        inner = top
        for key in keys:
            inner = inner.get(key) if isinstance(inner, dict) else None
        name = inner.get("class_path") if isinstance(inner, dict) else inner
        if isinstance(name, str):
            yield name
