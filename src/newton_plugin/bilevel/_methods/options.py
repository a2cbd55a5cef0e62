"""The arguments that the constructors of the four methods share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from newton_plugin._errors import check_choice, check_positive
from newton_plugin.bilevel._errors import check_count
from newton_plugin.bilevel._hypergradient.estimate import LinearSystem

__all__ = ["Options"]


@dataclass(frozen=True)
class Options:
    """The shared arguments of one optimizer, checked.

    Each constructor keeps a signature of its own, so that an editor shows its arguments and their defaults, and passes
    them on as one of these. :class:`AccBO` tells users what each argument means.

    Attributes:
        group_defaults: for "upper" and "lower", the options of a parameter group that names none of its own: ``lr``,
            and ``beta``, ``gamma`` or ``tau`` where the method has them. They are checked when a group is added,
            together with the values that the group brings along.
        solver, terms, scale, hvp: of the linear system.
        lower_steps, lower_every: the lower level moves ``lower_steps`` times at every ``lower_every``-th step.
        eps: the least norm that a direction is divided by.

    Raises:
        ArgumentError, ArgumentTypeError: an argument outside its rule.
    """

    group_defaults: Mapping[str, Mapping[str, float]]
    solver: str
    terms: int
    scale: float | None
    hvp: str
    lower_steps: int = 1
    lower_every: int = 1
    eps: float = 1e-12

    def __post_init__(self) -> None:
        check_positive("eps", self.eps)
        check_choice("solver", self.solver, ("neumann", "linear", "cg"))
        check_choice("hvp", self.hvp, ("autograd", "finite_difference"))
        check_count("terms", self.terms)
        if self.scale is not None:
            check_positive("scale", self.scale, "It is at most 1/L of the lower loss, and not the learning rate.")
        check_count("lower_steps", self.lower_steps)
        check_count("lower_every", self.lower_every)

    @cached_property
    def system(self) -> LinearSystem:
        """The linear system of the hypergradient."""
        return LinearSystem(self.solver, self.terms, self.scale, self.hvp)
