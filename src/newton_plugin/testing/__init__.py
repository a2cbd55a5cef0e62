"""For the author of a loss: what works for it, what does not, and why.

>>> import torch
>>> from newton_plugin.testing import check_loss
>>> outputs, target = torch.linspace(-1, 1, 36).reshape(12, 3), torch.arange(12) % 3
>>> report = check_loss(torch.nn.functional.cross_entropy, outputs, target)
>>> report.available, report.advice.take, report.definiteness.verdict
(('fisher', 'norm', 'hessian'), 'default', 'positive semidefinite')
"""

from newton_plugin.testing._check import check_loss
from newton_plugin.testing._look import look
from newton_plugin.testing._look_report import Cost, LookReport
from newton_plugin.testing._report import Finding, LossReport
from newton_plugin.testing._watch import Watch
from newton_plugin.testing._watching import Watching

__all__ = ["Cost", "Finding", "LookReport", "LossReport", "Watch", "Watching", "check_loss", "look"]
