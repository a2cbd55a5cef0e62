"""The quadratic surrogate on which Newton Losses train.

``1/2 ||y - z*||^2`` with the target ``z* = y - step`` held constant. At y its gradient is ``step``. So training never
has to evaluate the surrogate: it is enough that ``step`` enters the network (``splice.py``).
"""

from __future__ import annotations

from torch import Tensor

from newton_plugin._errors import ShapeError, check_choice, check_floating

__all__ = ["quadratic_surrogate"]


def quadratic_surrogate(outputs: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """``1/2 ||y_i - z_i||^2`` summed over features, mean or sum over the samples (Petersen et al. 2024, eq. 2).

    Args:
        outputs: y, (N, ...).
        target: z*, the same shape; treated as a constant.
        reduction: "mean" or "sum" over the N samples.

    Raises:
        ShapeError: shapes differ, or there is no batch dimension.
    """
    check_floating("outputs", outputs)
    check_floating("target", target)
    check_choice("reduction", reduction, ("mean", "sum"))
    if outputs.shape != target.shape or outputs.ndim == 0:
        raise ShapeError(
            "outputs and target must have the same shape (N, ...); got "
            f"{tuple(outputs.shape)} and {tuple(target.shape)}."
        )
    total = (outputs - target.detach()).square().sum() / 2
    return total / outputs.shape[0] if reduction == "mean" else total
