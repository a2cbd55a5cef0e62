"""For the author of a loss: what works for it, what does not, and why.

>>> import torch
>>> from newton_plugin.testing import check_loss
>>> outputs, target = torch.linspace(-1, 1, 12).reshape(4, 3), torch.tensor([0, 1, 2, 0])
>>> report = check_loss(torch.nn.functional.cross_entropy, outputs, target)
>>> report.curvature, report.auto, report.definiteness.verdict
('hessian', 'hessian', 'positive semidefinite')
"""

from newton_plugin.testing._check import check_loss
from newton_plugin.testing._report import Finding, LossReport

__all__ = ["Finding", "LossReport", "check_loss"]
