"""Code of a user, for a type checker. A line that is wrong on purpose says so; no other line may have an error."""

import torch

import newton_plugin as npl
from newton_plugin.algorithms import RankingLoss
from newton_plugin_lightning import NewtonLosses

hook = npl.LossHook(curvature="hessian", damping=0.1)
loss: torch.Tensor = hook(torch.zeros(()))
numbers: dict[str, float] = hook.diagnostics()
step: npl.NewtonStep = npl.newton_step(lambda y: y.square().sum(-1).mean(), torch.zeros(2, 3), damping=1.0)
callback = NewtonLosses(structure="isotropic")
ranking: torch.nn.Module = RankingLoss("neural_sort", temperature=0.1)

npl.LossHook(curvature="hesian")  # wrong: a misspelt name
npl.LossHook(dampening=0.1)  # wrong: no such argument
NewtonLosses(structure="diagonally")  # wrong: a misspelt name
wrong: int = hook.diagnostics()  # wrong: not an int
