"""Noticing that a method diverges, from the few norms that a step reads anyway to find NaN.

Too large a learning rate, too large a scale, or a lower loss that is not convex let something grow by a constant factor
at every step. It takes hundreds of steps until a number overflows; until then the losses look merely large, and with
normalised upper steps nothing is to be seen at all. So every step compares

* the norm of the parameters of each level with that at the first step;
* the solution v of the linear system with what stable iterations can reach (``SolverState``).

Both are far beyond what training does, and a scale of a user's own may be an exception: this is a warning.
"""

from __future__ import annotations

import warnings

from torch import Tensor

from newton_plugin.bilevel._errors import DivergenceWarning

__all__ = ["grown", "strayed", "warn_of_divergence"]

GROWTH = 1e6  # of the norm of a level's parameters, over that at the first step or 1
# Of ||v|| over what stable iterations can reach. With 1/L as the scale only negative curvature can make any; ten terms
# make at most 2^10 / 10 of the strongest, which often passes as the lower level is trained. A scale given by hand has
# no such excuse.
EXCESS, EXCESS_OF_GIVEN_SCALE = 1e3, 10.0


def grown(level: str, now: float, start: float, rate: float, bound: Tensor | None) -> str:
    """What to say of a level's parameters, or nothing.

    Args:
        level: "upper" or "lower".
        now, start: their norm now and at the first step.
        rate: the largest learning rate of the level.
        bound: the largest curvature of the lower loss that was seen.
    """
    if now <= GROWTH * max(1.0, start):
        return ""
    said = f"the norm of {level}_params is {now:.2g}; it was {start:.2g} at the first step. Lower lr_{level}={rate:g}"
    if level == "upper":
        return f"{said}, or see first that the lower level is trained: warm_start."
    if bound is not None and bound > 0:
        said += f" (the largest curvature seen is {bound:.2g}; gradient steps are stable below 2/{bound:.2g})"
    return f"{said}, or add weight decay to the lower loss."


def strayed(excess: float, scale: float | None) -> str:
    """What to say of the linear system, or nothing.

    Args:
        excess: of ``SolverState``.
        scale: that of the user.
    """
    if excess <= (EXCESS if scale is None else EXCESS_OF_GIVEN_SCALE):
        return ""
    remedy = "" if scale is None else f"Lower scale={scale:g}, which must be below 2/L, L the largest curvature; or "
    said = f"the solution of the linear system is {excess:.2g} times as long as stable iterations can make it. {remedy}"
    return said + ("The" if scale is None else "the") + " lower loss is not convex here: add weight decay to it."


def warn_of_divergence(method: str, when: str, findings: list[str], stacklevel: int = 3) -> bool:
    """Warn of the findings that are not empty, and whether there were any; 3 shows the caller of the caller."""
    said = " ".join(finding for finding in findings if finding)
    if said:
        warnings.warn(f"{method} diverges{when}: {said}", DivergenceWarning, stacklevel=stacklevel)
    return bool(said)
