"""The arguments that all doors share: validated once, and made into rules. A new name for a curvature begins here."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from newton_plugin._boundary.rows import check_feature_dims
from newton_plugin._curvature.damping import AutoDamping, Damping, resolve_damping
from newton_plugin._curvature.fisher import EmpiricalFisher
from newton_plugin._curvature.gated import GatedFisher, relative_ratio
from newton_plugin._curvature.hessian import Hessian
from newton_plugin._curvature.protocol import STRUCTURES, Curvature, Structure, check_power
from newton_plugin._curvature.soft_normalization import SoftNormalization
from newton_plugin._derivatives.products import Probing
from newton_plugin._errors import (
    ArgumentError,
    ArgumentTypeError,
    check_choice,
)
from newton_plugin._step.rule import OnNonfinite, StepRule
from newton_plugin._step.size import Gain

__all__ = ["CurvatureName", "Reduction", "RuleSettings", "StructureChoice", "Sync", "resolve_curvature"]


CurvatureName = Literal["fisher", "hessian", "norm", "auto"]
StructureChoice = Literal["auto", "gated"] | Structure
Reduction = Literal["mean", "sum"]
Sync = bool | Literal["lagged"]
_CURVATURES = get_args(CurvatureName)


def resolve_curvature(curvature: object, structure: Any, power: Any, damping: Damping) -> Curvature:
    """A name or an instance, as an instance; see :class:`newton_plugin.LossHook` for structure "auto"."""
    check_choice("structure", structure, ("auto", *STRUCTURES, "gated"))
    power = check_power(power)
    if isinstance(curvature, str):
        check_choice("curvature", curvature, _CURVATURES)
        curvature = "fisher" if curvature == "auto" else curvature  # the default; a Hessian is asked for by name
        if curvature == "norm":
            if structure not in ("auto", "mean", "per_sample"):
                raise ArgumentError(
                    f"structure must be 'auto' or 'per_sample' with curvature='norm', which normalises each sample; "
                    f"got {structure!r}. Leave it out, or take curvature='fisher'."
                )
            return SoftNormalization()
        if structure == "gated":
            return _gated(curvature, power, damping)
        kind = {"fisher": EmpiricalFisher, "hessian": Hessian}[curvature]
        if structure == "auto":
            relative = kind is EmpiricalFisher and power == 1 and isinstance(damping, AutoDamping)
            structure = "isotropic" if relative else "mean"
        return kind(structure, power)
    if isinstance(curvature, Curvature):
        if structure not in ("auto", "mean") or power != 1:
            raise ArgumentError(
                f"structure and power belong to the instance when curvature is one; got {curvature!r} with "
                f"structure={structure!r}, power={power:g}. Give them to its constructor."
            )
        return copy.deepcopy(curvature)
    raise ArgumentTypeError(
        f"curvature must be one of {', '.join(map(repr, _CURVATURES))} or an instance such as npl.Hessian(); "
        f"got {curvature!r} of type {type(curvature).__name__}. A curvature of your own is a subclass of npl.Curvature."
    )


def _gated(curvature: str, power: float, damping: Damping) -> GatedFisher:
    if curvature != "fisher" or power != 1 or not isinstance(damping, AutoDamping):
        raise ArgumentError(
            "structure='gated' is a Fisher of power 1 with damping='auto'; got "
            f"curvature={curvature!r}, power={power:g}, damping={damping!r}. Leave these at their defaults, or take "
            "structure='isotropic'."
        )
    return GatedFisher()


@dataclass(frozen=True)
class RuleSettings:
    """The arguments that all doors share, validated once; :meth:`build` makes a rule for one boundary."""

    curvature: CurvatureName | Curvature = "fisher"
    damping: float | Literal["auto"] | Damping = "auto"
    structure: StructureChoice = "auto"
    power: float = 1
    reduction: Reduction = "mean"
    feature_dims: int | Sequence[int] | None = None
    on_nonfinite: OnNonfinite = "keep"
    sync: Sync = True
    compile_step: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.sync, (bool, str)):
            raise ArgumentTypeError(
                f"sync must be True, False or 'lagged'; got {self.sync!r} of type {type(self.sync).__name__}. True "
                "averages the curvature over all processes of a distributed run."
            )
        if not isinstance(self.compile_step, bool):
            raise ArgumentTypeError(
                f"compile_step must be True or False; got {self.compile_step!r} of type "
                f"{type(self.compile_step).__name__}. True compiles the step by torch.compile."
            )
        check_choice("sync", self.sync, (True, False, "lagged"))
        check_choice("reduction", self.reduction, ("mean", "sum"))
        check_choice("on_nonfinite", self.on_nonfinite, ("keep", "raise"))
        object.__setattr__(self, "feature_dims", check_feature_dims(self.feature_dims))
        rule = self.build()
        if isinstance(rule.curvature, GatedFisher):
            relative_ratio(rule.damping)
        self._check_lagged(rule)

    def _check_lagged(self, rule: StepRule) -> None:
        if self.sync == "lagged" and not rule.one_number:
            raise ArgumentError(
                f"sync='lagged' takes a curvature whose statistics are one number; got {rule.curvature!r}, whose C "
                "would not fit the samples of the next step. Use curvature='fisher' with structure='isotropic' or "
                "'per_sample', curvature='norm', or sync=True."
            )
        if self.sync == "lagged" and self.on_nonfinite == "raise":
            raise ArgumentError(
                "on_nonfinite='raise' raises on all ranks together, and with sync='lagged' no rank waits for the "
                "others. Use sync=True to find what is not finite, or on_nonfinite='keep'."
            )

    def build(self) -> StepRule:
        """A rule with a running state of its own."""
        damping = resolve_damping(self.damping)
        if damping is self.damping:  # the user's own
            damping = copy.deepcopy(damping)
        curvature = resolve_curvature(self.curvature, self.structure, self.power, damping)
        # Factories of fields are written out: torch.compile does not follow those of a dataclass.
        state = {"gain": Gain(), "probing": Probing(), "_reported": set()}
        return StepRule(curvature, damping, on_nonfinite=self.on_nonfinite, **state)

    @functools.cached_property
    def one_number(self) -> bool:
        """Whether the rules need one number of all processes; see ``Curvature.one_number``."""
        return self.build().one_number

    @functools.cached_property
    def names_knowledge(self) -> bool:
        """Whether the rules tell what they know of the Hessians; see ``Curvature.knowledge``."""
        return self.build().curvature.names_knowledge

    @property
    def features(self) -> tuple[int, ...] | None:
        """The feature dimensions as a tuple."""
        return self.feature_dims  # type: ignore[return-value]  # made one when they were checked

    def describe(self, without: Sequence[str] = ()) -> str:
        """The arguments that differ from their defaults, for ``repr``; those of ``without`` are left out."""
        defaults = RuleSettings.__dataclass_fields__
        shown = {k: getattr(self, k) for k in defaults if k not in without}
        return ", ".join(f"{k}={v!r}" for k, v in shown.items() if v != defaults[k].default)
