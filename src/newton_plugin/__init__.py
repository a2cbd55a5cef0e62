"""Newton Losses for PyTorch: second-order steps at the loss boundary.

Train the network with any first-order optimizer; where its outputs meet the loss, take the Newton step in
output space and train on the quadratic surrogate. Three doors:

* ``newton_loss(loss_fn)``: wrap or decorate a loss function.
* ``LossHook()(loss)``: one line before ``backward()`` in any loop.
* ``newton_plugin_lightning.NewtonLosses()``: a Lightning callback.
"""

from newton_plugin import functional, testing
from newton_plugin._curvature.conflict import GradientConflict
from newton_plugin._curvature.damping import AutoDamping, Averaging, Damping, Tikhonov
from newton_plugin._curvature.finiteness import Finiteness
from newton_plugin._curvature.fisher import EmpiricalFisher
from newton_plugin._curvature.gated import GatedFisher
from newton_plugin._curvature.hessian import Hessian
from newton_plugin._curvature.protocol import Curvature, CurvatureStep
from newton_plugin._curvature.soft_normalization import SoftNormalization
from newton_plugin._derivatives.closed_forms import with_hessian
from newton_plugin._doors.found import FoundBoundary
from newton_plugin._doors.loss_hook import LossHook
from newton_plugin._doors.newton_loss import NewtonLoss, newton_loss
from newton_plugin._doors.newton_step import NewtonStep, newton_step
from newton_plugin._errors import (
    ArgumentError,
    ArgumentTypeError,
    BatchCoupledError,
    CaptureError,
    NewtonPluginError,
    NoBoundaryError,
    NoGradientError,
    NonFiniteError,
    OutputsTooLargeError,
    RanksDisagreeError,
    ShapeError,
    SingularCurvatureError,
    TransformError,
)
from newton_plugin._step.surrogate import quadratic_surrogate

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "AutoDamping",
    "Averaging",
    "BatchCoupledError",
    "CaptureError",
    "Curvature",
    "CurvatureStep",
    "Damping",
    "EmpiricalFisher",
    "Finiteness",
    "FoundBoundary",
    "GatedFisher",
    "GradientConflict",
    "Hessian",
    "LossHook",
    "NewtonLoss",
    "NewtonPluginError",
    "NewtonStep",
    "NoBoundaryError",
    "NoGradientError",
    "NonFiniteError",
    "OutputsTooLargeError",
    "RanksDisagreeError",
    "ShapeError",
    "SingularCurvatureError",
    "SoftNormalization",
    "Tikhonov",
    "TransformError",
    "functional",
    "newton_loss",
    "newton_step",
    "quadratic_surrogate",
    "testing",
    "with_hessian",
]
