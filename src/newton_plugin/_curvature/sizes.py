"""The sizes at which a curvature is computed in another way, and what is refused before it is allocated.

The thresholds of the curvatures stand here, with the measurements that set them. Those of one algorithm of ``_linalg``
or ``_derivatives``, and sizes that only decide how much is worked on at once, stand beside the code.
"""

from __future__ import annotations

from torch import Tensor

from newton_plugin._curvature.damping import Damping
from newton_plugin._curvature.protocol import Structure
from newton_plugin._derivatives.sample_hessians import SampleHessians
from newton_plugin._errors import OutputsTooLargeError
from newton_plugin._linalg.krylov import KrylovOptions
from newton_plugin._runtime.processes import Ranks

__all__ = [
    "DENSE_FEATURES",
    "DIAGONAL_PROBES",
    "EXACT_DIAGONAL_FEATURES",
    "FORMED_FROM_BLOCKS",
    "FORMED_FROM_PRODUCTS",
    "MAX_BYTES",
    "PER_SAMPLE_FEATURES",
    "SHOWN_FEATURES",
    "mean_is_formed",
    "refuse_beyond",
    "refuse_if_too_large",
]

# Where N < m, an N x N system takes the place of the m x m one. Measured at N = 128, float64, one core: to form and
# solve C costs 0.4 ms at m = 100, 1.5 at 200, 50 at 1,000, against 1.5 and 5.4 for the N x N system at 200 and 1,000.
# Up to DENSE_FEATURES C is formed in any case. Up to AVERAGED_FEATURES its running mean is worth its 3 ms.
DENSE_FEATURES = 128
AVERAGED_FEATURES = 256

# The thresholds below trade time for exactness. Measured is the time of the exact way over that of the other, N = 100,
# float64, one core, median of 5 to 7 on a busy machine.

# The mean Hessian is formed up to so many features, from m products or from known blocks (N = 16). Above, 32 products
# sketch it. From products: 3.2 at m = 128, 7.7 at 256, 17 at 512. From blocks: 1.5 at 512, 2.0 at 1,024, 2.5 at 2,048.
FORMED_FROM_PRODUCTS = 256
FORMED_FROM_BLOCKS = 1024

# Every H_i is formed by m products up to so many features. Above, Krylov spaces take 5 to 9 products: 6 at m = 64,
# 16 at 128, 82 at 256.
PER_SAMPLE_FEATURES = 128

# The diagonal of a mean Hessian comes from m products up to so many features. Above, a few random probes estimate it:
# 5.6 at m = 128, 17 at 256, 32 at 512.
EXACT_DIAGONAL_FEATURES = 256
DIAGONAL_PROBES = 8

# A known diagonal plus rank one needs no matrix and is exact without. Up to so many features all H_i are formed
# nevertheless, for CurvatureStep.matrix to show them: 1.7 at m = 16, 5 at 32 (cross-entropy, N = 128).
SHOWN_FEATURES = 16

MAX_BYTES = 2 * 1024**3  # of one tensor; chosen, not measured


def mean_is_formed(n: int, m: int, damping: Damping, ranks: Ranks) -> bool:
    """Whether the mean C of n samples (of all ranks) is formed, or replaced by a system of N x N."""
    dense = AVERAGED_FEATURES if damping.averaging.decay else DENSE_FEATURES
    return m <= dense or ranks.count(n) >= m


def refuse_beyond(elements: int, asked: str, what: str, remedy: str) -> None:
    """Raise :class:`OutputsTooLargeError` if so many numbers in float64 need more than ``MAX_BYTES``.

    Args:
        elements: how many numbers.
        asked: the arguments and sizes that lead there.
        what: what the numbers are.
        remedy: what to do.
    """
    if 8 * elements > MAX_BYTES:
        raise OutputsTooLargeError(
            f"{asked} needs {what} of {8 * elements / 1024**3:.1f} GiB, more than the limit of "
            f"{MAX_BYTES / 1024**3:.0f} GiB. {remedy}"
        )


def refuse_if_too_large(
    hessians: SampleHessians, gradient: Tensor, structure: Structure, groups: int, krylov: KrylovOptions
) -> None:
    """Raise :class:`OutputsTooLargeError` before allocating what does not fit."""
    n, m = gradient.shape
    asked = f"curvature='hessian' with structure={structure!r} and outputs of {m} features (N = {n})"
    instead = "Use {}curvature='fisher' (O(N m) memory) or 'norm', or name fewer features by feature_dims."
    rank_one = hessians.diagonal_rank_one is not None
    if not rank_one and hessians.blocks is not None:
        refuse_beyond(n * m * m, asked, "a dense C", instead.format(""))
    elif structure == "block":
        refuse_beyond(groups * m * m, asked, "a dense C", instead.format("structure='mean' or 'diagonal', "))
    elif structure == "per_sample" and m > PER_SAMPLE_FEATURES and not rank_one:
        what = f"Krylov spaces of {krylov.most} products"
        refuse_beyond((krylov.most + 6) * n * m, asked, what, instead.format("npl.Hessian(..., products=4), "))
    elif structure == "per_sample" and m <= PER_SAMPLE_FEATURES:
        refuse_beyond(n * m * m, asked, "a dense C", instead.format(""))
