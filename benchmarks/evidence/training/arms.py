"""The arms: ways to train on the same loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from benchmarks.evidence.rules.all_rules import RULES
from benchmarks.evidence.rules.gated import Gated, Size
from benchmarks.evidence.rules.our_rule import GeometricMean
from benchmarks.evidence.rules.rule import Rule

import newton_plugin as npl

__all__ = ["ARMS", "BASELINE", "CANDIDATES", "COMPOSED", "DEFAULT", "Arm", "arms_of", "configurations", "shown"]

BASELINE = "plain, stable"
DEFAULT = "isotropic"
"""The arm that is the package's default."""
RATES = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2)
TWO_RATES = (5e-3, 2e-2)
LOWER_RATES = (2e-4, 5e-4)  # for images of 28 x 28: plain training had its best rate at the edge
DAMPINGS = (0.01, 0.1, 1.0)
SEARCH_RATES = (3e-3, 1e-2, 3e-2)
MakeRule = Callable[[float | None], tuple[npl.Curvature, npl.Damping]]


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Attributes:
        newton: curvature and damping for a value of the arm's second number; None: the plain gradient.
        rule: a rule for all replicas at once, which stacks of replicas take in place of ``newton``.
        second: values of the second number to choose from.
        clips: the second number is a norm at which the parameters' gradient is clipped.
        textbook: the loss as one writes it down first.
        beta2: of Adam.
        normalises: the parameters' gradient is divided by the running mean of its norm.
    """

    newton: MakeRule | None = None
    rule: Callable[[], Rule] | None = None
    second: tuple[float, ...] = ()
    clips: bool = False
    textbook: bool = False
    beta2: float = 0.999
    normalises: bool = False


def _fixed(kind: type[npl.EmpiricalFisher] | type[npl.Hessian]) -> MakeRule:
    def make(second: float | None) -> tuple[npl.Curvature, npl.Damping]:
        assert second is not None
        return kind(), npl.Tikhonov(second)

    return make


def _gated(gate: Literal["conflict"] | float = "conflict", size: Size = "signal", most: float = 2.0) -> Arm:
    """The package's rule; stacks of replicas take its dense twin, which is the same step (tested)."""
    return Arm(
        lambda _: (npl.GatedFisher(gate=gate, size=size, most=most), npl.AutoDamping()),
        rule=lambda: Gated(gate, size, most=most),
    )


GATED: dict[str, Arm] = {
    "gated": _gated(),
    "gated, norm": _gated(size="norm"),
    "gated, newton": _gated(size="newton"),
    "gated, plain size": _gated(size="plain"),
    "gated, unbounded": _gated(most=math.inf),
    "gated, bound stays": Arm(rule=lambda: Gated(lifts=False)),
    "gate half open": _gated(gate=0.5),
    "size alone": _gated(gate=0.0),
    "gate inverted": Arm(rule=lambda: Gated("inverted")),
    "groups at random": Arm(rule=lambda: Gated("random")),
}
"""The rule that looks at the last layer, and its controls (protocol, amendment 14)."""

ARMS: dict[str, Arm] = {
    "plain, textbook": Arm(textbook=True),
    BASELINE: Arm(),
    "clipped": Arm(second=(0.01, 0.1, 1.0), clips=True),
    "short memory": Arm(beta2=0.9),
    "normalised": Arm(normalises=True),
    "soft normalisation": Arm(lambda _: (npl.SoftNormalization(), npl.AutoDamping())),
    "isotropic": Arm(lambda _: (npl.EmpiricalFisher("isotropic"), npl.AutoDamping())),
    "batch size": Arm(lambda _: (npl.EmpiricalFisher("isotropic"), npl.AutoDamping(own=0.0))),
    "Fisher": Arm(lambda _: (npl.EmpiricalFisher(), npl.AutoDamping())),
    "Fisher, fixed": Arm(_fixed(npl.EmpiricalFisher), second=DAMPINGS),
    "Hessian": Arm(lambda _: (npl.Hessian(), npl.AutoDamping())),
    "Hessian, fixed": Arm(_fixed(npl.Hessian), second=DAMPINGS),
    "Hessian per sample": Arm(lambda _: (npl.Hessian("per_sample"), npl.AutoDamping())),
    "our rule": Arm(lambda _: (GeometricMean(), npl.AutoDamping())),
    **GATED,
}
"""The arms of the tables."""

COMPOSED = {"gated by optimizer": {"adam": "gated", "sgd": "gated, plain size"}}
"""What a door does that knows the optimizer: of each problem the rows of another arm (protocol, amendment 17)."""

CANDIDATES: dict[str, Arm] = {
    **{name: Arm(rule=rule) for name, rule in RULES.items()},
    "textbook, Fisher": replace(ARMS["Fisher"], textbook=True),
    "textbook, our rule": replace(ARMS["our rule"], textbook=True),
}
"""The candidates of the search for a rule; it compares the arms above too."""


def configurations(arm: Arm, optimizer: str, data: str = "digits") -> list[tuple[float, float | None]]:
    """Learning rates and second numbers that an arm chooses from: six, whatever the arm; eight for other images."""
    factor, lower = 10.0 if optimizer == "sgd" else 1.0, () if data == "digits" else LOWER_RATES
    if arm.second:
        return [(factor * rate, second) for rate in (*lower[1:], *TWO_RATES) for second in arm.second]
    return [(factor * rate, None) for rate in (*lower, *RATES)]


def shown(arm: str) -> str:
    """The name of an arm in tables."""
    return f"default: {arm}" if arm == DEFAULT else arm


def arms_of(seen: Iterable[str]) -> list[str]:
    """The arms of a table in which these were seen: those of the gate have tables of their own."""
    gated = not GATED.keys().isdisjoint(seen)
    return [arm for arm in ARMS if arm in (BASELINE, DEFAULT, "isotropic") or (arm in GATED) == gated]
