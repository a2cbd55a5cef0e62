"""Bilevel optimization: losses that contain a training loop.

The *lower* level trains y on a loss G(x, y), which also depends on *upper* parameters x: the weight of every sample,
the strength of a regulariser. The upper level chooses x so that the trained y does well on another loss F. The
gradient of ``F(x, y*(x))`` in x is an implicit derivative, the :func:`hypergradient`. The optimizers move both levels
at every step; start with :class:`MASOBA`.
"""

from newton_plugin.bilevel._errors import DivergenceWarning, DoubleBackwardError, GradScalerError, NotConvergedError
from newton_plugin.bilevel._hypergradient.hypergradient import hypergradient
from newton_plugin.bilevel._hypergradient.oracle import OracleCalls
from newton_plugin.bilevel._methods.accbo import AccBO
from newton_plugin.bilevel._methods.borep import BOREP
from newton_plugin.bilevel._methods.masoba import MASOBA
from newton_plugin.bilevel._methods.stocbio import StocBiO

__all__ = [
    "BOREP",
    "MASOBA",
    "AccBO",
    "DivergenceWarning",
    "DoubleBackwardError",
    "GradScalerError",
    "NotConvergedError",
    "OracleCalls",
    "StocBiO",
    "hypergradient",
]
