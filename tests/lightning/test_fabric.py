"""Lightning Fabric and a loop of one's own: ``hook(loss)`` before ``fabric.backward``, and nothing else."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from tests.cases import Functional
from tests.lightning.fits import batches_of, case_module, parameters
from tests.lightning.test_exact import worst
from tests.lightning.test_trainer_settings import of_dtype, plain_loop, scaler_for

import newton_plugin as npl


def fabric_of(pl: Any) -> Any:
    return importlib.import_module("lightning.fabric" if pl.__name__.startswith("lightning.") else "lightning_fabric")


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("precision", ["64-true", "32-true", "bf16-mixed", "16-mixed"])
def test_fabric_backward_equals_the_plain_loop(pl: Any, precision: str, accumulate: int) -> None:
    fabric = fabric_of(pl)
    dtype = torch.float64 if precision == "64-true" else torch.float32
    batches = of_dtype(batches_of(Functional, 8), dtype)
    twin = case_module(pl, Functional).to(dtype).model
    plain_loop(twin, batches, precision, accumulate, clip=None)

    options: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed":
        plugins = importlib.import_module(f"{fabric.__name__}.plugins.precision.amp")
        options = {"plugins": plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler_for(precision))}
    runner = fabric.Fabric(accelerator="cpu", devices=1, **options)
    bare = case_module(pl, Functional).to(dtype).model
    model, optimizer = runner.setup(bare, torch.optim.SGD(bare.parameters(), lr=1.0))
    hook = npl.LossHook(damping="auto")
    hook.set_optimizer(optimizer)
    for k, (x, t) in enumerate(batches):
        with runner.autocast():
            loss = hook(bare.loss(model(x), t)) / accumulate
        with runner.no_backward_sync(model, enabled=False):
            runner.backward(loss)
        if (k + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    # Fabric casts the outputs to float32 in mixed precision, so the loss there is not rounded as in the bare loop.
    far = worst([p.double() for p in parameters(bare)], [p.double() for p in parameters(twin)])
    assert far <= (1e-2 if "mixed" in precision else 0)


def test_the_guard_against_a_plain_backward_is_back_in_place(pl: Any) -> None:
    """Fabric still refuses ``loss.backward()`` in mixed precision, also for a Hessian and after an error."""
    runner = fabric_of(pl).Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    model = runner.setup(case_module(pl, Functional).float().model)
    x, t = of_dtype(batches_of(Functional, 1), torch.float32)[0]
    loss = npl.LossHook(curvature="hessian")(model.loss(model(x), t))
    with pytest.raises(RuntimeError, match=r"requires you to call `fabric\.backward"):
        loss.backward()
    runner.backward(npl.LossHook(curvature="hessian")(model.loss(model(x), t)))
