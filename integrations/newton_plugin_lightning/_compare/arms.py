"""The arms of a comparison: ways to train, each tried at the same learning rates.

Written as words: ``plain``, ``default`` (``NewtonLosses()``), ``norm`` (``curvature="norm"``), the controls that need
no package, ``normalised`` and ``clipped``, ``yours`` (the callback in the configuration), and
``name:argument=value,argument=value`` for any other arguments of ``NewtonLosses``.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from newton_plugin import ArgumentError, ArgumentTypeError
from newton_plugin_lightning._callback import NewtonLosses

__all__ = ["NAMED", "PLAIN", "YOURS", "Arm", "Kind", "arms_from_mapping", "arms_from_words", "same_rule", "with_plain"]

Kind = Literal["plain", "newton", "normalised", "clipped", "yours"]


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Attributes:
        name: in the tables.
        kind: "newton" adds ``NewtonLosses(**arguments)``; "yours" leaves in place what the configuration has.
        arguments: of the callback.
    """

    name: str
    kind: Kind = "newton"
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def describe(self) -> str:
        """What distinguishes the arm, the same in every process."""
        inside = ", ".join(f"{key}={value!r}" for key, value in sorted(self.arguments.items()))
        return f"{self.kind}({inside})"


PLAIN = Arm("plain", "plain")
YOURS = Arm("yours", "yours")
NAMED = {
    arm.name: arm
    for arm in (
        PLAIN,
        Arm("default"),
        Arm("norm", arguments={"curvature": "norm"}),
        Arm("normalised", "normalised"),
        Arm("clipped", "clipped"),
    )
}
_ARGUMENTS = {
    name: p.default for name, p in inspect.signature(NewtonLosses.__init__).parameters.items() if name != "self"
}
_SILENT = {"log", "prog_bar"}  # they change no step


def arms_from_words(words: Iterable[str]) -> list[Arm]:
    """Arms as a person types them.

    Raises:
        ArgumentError: a word that names no arm, or arguments that ``NewtonLosses`` does not take.
    """
    return with_plain([_from_word(word) for word in words])


def arms_from_mapping(arms: Mapping[str, Mapping[str, Any]]) -> list[Arm]:
    """Arms by name, each with the arguments of its ``NewtonLosses``.

    Raises:
        ArgumentError, ArgumentTypeError: arguments that ``NewtonLosses`` does not take.
    """
    return with_plain([_checked(name, arguments) for name, arguments in arms.items()])


def with_plain(arms: list[Arm]) -> list[Arm]:
    """The arms with plain training first: it is what the others are compared with."""
    arms = [PLAIN, *(arm for arm in arms if arm != PLAIN)]
    names = [arm.name for arm in arms]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ArgumentError(f"arms must have different names; got {twice[0]!r} more than once. Name one differently.")
    return arms


def same_rule(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Whether two callbacks take the same steps."""

    def told(arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in arguments.items() if k not in _SILENT and v != _ARGUMENTS.get(k)}

    return told(ours) == told(theirs)


def _from_word(word: str) -> Arm:
    name, colon, rest = word.partition(":")
    if colon:
        pairs = [pair.partition("=") for pair in rest.split(",")]
        wrong = [key for key, equals, _ in pairs if not equals]
        if not name or wrong:
            raise ArgumentError(f"an arm is written name:argument=value,argument=value; got {word!r}.")
        return _checked(name, {key.strip(): yaml.safe_load(value) for key, _, value in pairs})
    if word == YOURS.name:
        return YOURS
    if word not in NAMED:
        raise ArgumentError(
            f"arms must be of {', '.join([*NAMED, YOURS.name])} or name:argument=value; got {word!r}."
            f"{_meant(word, [*NAMED, YOURS.name])}"
        )
    return NAMED[word]


def _checked(name: str, arguments: Mapping[str, Any]) -> Arm:
    if not isinstance(arguments, Mapping):
        raise ArgumentTypeError(
            f"arms must map a name to the arguments of NewtonLosses, a dict; got {arguments!r} for {name!r}."
        )
    for key in arguments:
        if key not in _ARGUMENTS:
            raise ArgumentError(
                f"arm {name!r}: NewtonLosses takes {', '.join(_ARGUMENTS)}; got {key!r}.{_meant(key, list(_ARGUMENTS))}"
            )
    NewtonLosses(**arguments)  # refuses wrong values here, before anything is trained
    return Arm(name, arguments=dict(arguments))


def _meant(word: str, names: list[str]) -> str:
    close = difflib.get_close_matches(word, names, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
