"""Errors of the command line in one line each, with the name that was meant.

jsonargparse tells what every alternative of a type says about a value, over dozens of lines. The first of them that
says something about this value, rather than about its own kind, is what the person wants to know.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import re
from collections.abc import Iterable, Iterator

from newton_plugin import NewtonPluginError

__all__ = ["in_one_line"]

_UNION = "Does not validate against any of the Union subtypes"
# Lines that name a place or a kind, and say nothing about the value.
_NO_NEWS = re.compile(
    r"Does not validate|Subtypes:|Errors:|Given value|Not a valid subclass|Subclass types expect|a class path|a dict |"
    r"Expected a (<class 'NoneType'>|(config )?path|dot import path|typing\.Literal\[[^]]*\]$)"
)


def in_one_line(error: BaseException) -> str | None:
    """What to print for an error of arguments or of this package; None for any other, which keeps its traceback."""
    ours = next((e for e in _chain(error) if isinstance(e, NewtonPluginError)), None)
    if ours is not None:
        return str(ours)
    text = str(error)
    # a constructor of ours that refuses its arguments, tried as one alternative of a type among others
    refused = isinstance(error, ValueError) and _UNION in text and "class_path='newton_plugin" in text
    if isinstance(error, argparse.ArgumentError) or refused:
        return _condensed(text, getattr(error, "options", ()))
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those that it came from, as a traceback shows them."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _condensed(text: str, options: Iterable[str]) -> str:
    key = kind = inner = leaf = names = ""
    for line in (line.strip().removeprefix("- ") for line in text.splitlines()):
        if found := re.match(r'Parser key "([^"]*)":? ?(.*)', line):
            key, inner = (key, found[1]) if key else (found[1], "")
            line = found[2]
        elif found := re.match(r"Problem with given class_path '([^']*)'", line):
            kind, inner, line = found[1], "", ""
        elif re.match(r"Expected a typing\.Literal\[[^]]*\]$", line):
            names = line
        elif names and (found := re.match(r"Given value: (.*)", line)):  # no alternative beside the names says more
            line = f"{names}. Got value: {found[1]}"
        if line and not _NO_NEWS.match(line):
            leaf = line
            break
    leaf = leaf or _last_word(text) or " ".join(text.split())
    where = ", ".join(part for part in (key, kind.rpartition(".")[2], inner) if part)
    said = f"{where}: {leaf}" if where else leaf
    return said + _meant(leaf, kind, options)


def _last_word(text: str) -> str:
    """Where no alternative says more than its kind: that of a class that is not known by its short name."""
    found = re.search(r"Expected a dot import path string: .*", text)
    return found[0] if found else ""


def _meant(leaf: str, kind: str, options: Iterable[str]) -> str:
    """The nearest right name, if the leaf is about a wrong one."""
    if "did you mean" in leaf:
        return ""
    if found := re.search(r"Option '([^']*)' is not accepted|No action for key \"([^\"]*)\"", leaf):
        wrong, right = found[1] or found[2], _parameters(kind) if kind else [o.lstrip("-") for o in options]
    elif found := re.search(r"Literal\[(.*)\].* Got value: (.*)", leaf):
        wrong, right = found[2], re.findall(r"'([^']*)'", found[1])
    elif found := re.search(r"unrecognized arguments: --([\w.]+)|accept option '([^']*)'", leaf, re.IGNORECASE):
        wrong, right = found[1] or found[2], [option.lstrip("-") for option in options]
    elif found := re.search(r"import path string: (\S+)", leaf):
        wrong, right = found[1], importlib.import_module("newton_plugin_lightning").__all__
    elif found := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", leaf):
        wrong, right = found[1], [*re.findall(r"\w+", found[2]), "compare", "look"]
    elif found := re.search(r"module '([^']*)' has no attribute '([^']*)'", leaf):
        wrong, right = found[2], dir(importlib.import_module(found[1]))
    else:
        return ""
    close = difflib.get_close_matches(wrong, list(right), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _parameters(kind: str) -> list[str]:
    module, _, name = kind.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return []
    made = [base.__init__ for base in inspect.getmro(found) if "__init__" in vars(base)]
    return [name for init in made for name in inspect.signature(init).parameters]
