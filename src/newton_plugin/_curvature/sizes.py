"""What is refused before it is allocated."""

from __future__ import annotations

from torch import Tensor

from newton_plugin._curvature.damping import Damping
from newton_plugin._curvature.protocol import Structure
from newton_plugin._derivatives.sample_hessians import HVP
from newton_plugin._errors import OutputsTooLargeError
from newton_plugin._linalg.krylov import KrylovOptions
from newton_plugin._runtime.processes import Ranks

__all__ = ["MAX_BYTES", "refuse_beyond"]

MAX_BYTES = 2 * 1024**3


def refuse_beyond(elements: int, asked: str, what: str, remedy: str) -> None:
    """Raise :class:`OutputsTooLargeError` if so many numbers in float64 take more than ``MAX_BYTES``.

    Args:
        elements: how many.
        asked: the arguments and sizes that lead there.
        what: what they are.
        remedy: what to do.
    """
    if 8 * elements > MAX_BYTES:
        raise OutputsTooLargeError(
            f"{asked} needs {what} of {8 * elements / 1024**3:.1f} GiB, more than the limit of "
            f"{MAX_BYTES / 1024**3:.0f} GiB. {remedy}"
        )


# Above this "auto" does not spend m products a step. Measured for a loss of N = 100 samples, float64: 2.7 ms a step at
# m = 10, 51 ms at m = 100, where a training step of a small CNN takes 70.
AUTO_FEATURES = 64


def refuse_if_too_large(hvp: HVP, gradient: Tensor, structure: Structure, groups: int, krylov: KrylovOptions) -> None:
    """Raise :class:`OutputsTooLargeError` before allocating what does not fit."""
    n, m = gradient.shape
    asked = f"curvature='hessian' with structure={structure!r} and outputs of {m} features (N = {n})"
    instead = "Use {}curvature='fisher' (O(N m) memory) or 'norm', or name fewer features by feature_dims."
    if getattr(hvp, "diagonal_rank_one", None) is None and getattr(hvp, "blocks", None) is not None:
        refuse_beyond(n * m * m, asked, "a dense C", instead.format(""))
    elif structure == "block":
        refuse_beyond(groups * m * m, asked, "a dense C", instead.format("structure='mean' or 'diagonal', "))
    elif structure == "per_sample" and m > PER_SAMPLE_FEATURES and getattr(hvp, "diagonal_rank_one", None) is None:
        what = f"Krylov spaces of {krylov.most} products"
        refuse_beyond((krylov.most + 6) * n * m, asked, what, instead.format("npl.Hessian(..., products=4), "))
    elif structure == "per_sample" and m <= PER_SAMPLE_FEATURES:
        refuse_beyond(n * m * m, asked, "a dense C", instead.format(""))


# Where N < m, an N x N system takes the place of the m x m one. Measured at N = 128, float64, one core: forming and
# solving C costs 0.4 ms at m = 100, 1.5 at 200, 50 at 1,000, against 1.5 and 5.4 for the N x N system at 200 and 1,000.
# Up to DENSE_FEATURES C is formed in any case; up to AVERAGED_FEATURES its running mean is worth its 3 ms.
DENSE_FEATURES = 128


AVERAGED_FEATURES = 256


def form_is_dense(n: int, m: int, damping: Damping, ranks: Ranks) -> bool:
    """Whether the mean C of n samples (of all ranks) is formed, or goes by a system of N x N."""
    dense = AVERAGED_FEATURES if damping.averaging.decay else DENSE_FEATURES
    return m <= dense or ranks.count(n) >= m


PER_SAMPLE_FEATURES = 128  # up to here every H_i is formed by m products; above, Krylov spaces take 5 to 9


_SMALL_FEATURES = 16  # up to here a known diagonal plus rank one is formed all the same: C is there to be looked at
