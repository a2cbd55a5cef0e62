"""Newton Losses as pure functions with explicit state, for ``torch.func``: see :func:`newton_loss`."""

from newton_plugin._doors.functional_loss import FunctionalNewtonLoss, NewtonState
from newton_plugin._doors.functional_loss import functional_newton_loss as newton_loss

__all__ = ["FunctionalNewtonLoss", "NewtonState", "newton_loss"]
