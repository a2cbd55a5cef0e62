"""Accelerate, Ignite and skorch themselves: the training that comes out is the surrogate's, written out."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.integrations.fits import DAMPING, RATE, batches, descend, distance, model, surrogate_fit
from torch import Tensor, nn

import newton_plugin as npl


@pytest.fixture
def accelerators() -> Iterator[Any]:
    """Accelerator, whose global settings are reset before and after."""
    accelerate = pytest.importorskip("accelerate")
    state = pytest.importorskip("accelerate.state")

    def reset() -> None:
        state.AcceleratorState._reset_state(True)
        state.GradientState._reset_state()

    reset()
    yield accelerate.Accelerator
    reset()


def accelerated(runner: Any, net: Any, data: list[Any], hook: npl.LossHook) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    prepared, optimizer = runner.prepare(net, optimizer)
    for x, t in data:
        with runner.accumulate(prepared):
            runner.backward(hook(net.loss(prepared(x), t)))
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_accelerate(accelerators: Any, accumulate: int) -> None:
    net, twin = model(), model()
    runner = accelerators(cpu=True, gradient_accumulation_steps=accumulate)
    accelerated(runner, net, batches(), npl.LossHook(damping=DAMPING))
    surrogate_fit(twin, batches(), accumulate)
    assert distance(net, twin) < 1e-10
    assert distance(net, model()) > 1e-3


def test_accelerate_in_mixed_precision_is_the_plain_loop(accelerators: Any) -> None:
    data = [(x.float(), t) for x, t in batches()]
    net, twin = model().float(), model().float()
    accelerated(accelerators(cpu=True, mixed_precision="bf16"), net, data, npl.LossHook())
    hook = npl.LossHook()
    for x, t in data:
        twin.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = twin(x)
        hook(twin.loss(y.float(), t)).backward()
        descend(twin)
    assert distance(net, twin) < 1e-6


@pytest.mark.parametrize("accumulate", [1, 2])
def test_ignite(accumulate: int) -> None:
    engine = pytest.importorskip("ignite.engine")
    net, twin = model(), model()
    loss_fn = npl.newton_loss(torch.nn.functional.cross_entropy, damping=DAMPING)
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    trainer = engine.create_supervised_trainer(net, optimizer, loss_fn, gradient_accumulation_steps=accumulate)
    trainer.run(batches(), max_epochs=1)
    surrogate_fit(twin, batches(), accumulate)
    assert distance(net, twin) < 1e-10
    evaluator = engine.create_supervised_evaluator(net, {"loss": pytest.importorskip("ignite.metrics").Loss(loss_fn)})
    x, t = batches(1)[0]
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(net(x), t).item()
    assert evaluator.run([(x, t)]).metrics["loss"] == pytest.approx(expected)


def skorch_net(module: nn.Module, **options: Any) -> Any:
    skorch = pytest.importorskip("skorch")
    settings: dict[str, Any] = {
        "criterion": npl.NewtonLoss,
        "criterion__loss_fn": nn.functional.cross_entropy,
        "criterion__damping": DAMPING,
        "optimizer": torch.optim.SGD,
        "lr": RATE,
        "max_epochs": 1,
        "batch_size": len(batches(1)[0][1]),
        "train_split": None,
        "verbose": 0,
        "iterator_train__shuffle": False,
    }
    return skorch.NeuralNetClassifier(module, **{**settings, **options})


def stacked() -> tuple[Tensor, Tensor]:
    x, t = zip(*batches(), strict=True)
    return torch.cat(x), torch.cat(t)


@pytest.mark.parametrize(
    "criterion",
    [
        {},
        {
            "criterion": npl.NewtonLoss(nn.functional.cross_entropy, damping=DAMPING),
            "criterion__loss_fn": None,
            "criterion__damping": None,
        },
    ],
    ids=["class", "instance"],
)
def test_skorch(criterion: dict[str, Any]) -> None:
    net, twin = model(), model()
    fitted = skorch_net(net, **criterion)
    if criterion:
        fitted = skorch_net(net, criterion=criterion["criterion"])
        for name in ("loss_fn", "damping"):
            delattr(fitted, f"criterion__{name}")
    x, t = stacked()
    fitted.fit(x, t)
    surrogate_fit(twin, batches())
    assert distance(fitted.module_, twin) < 1e-10
    assert pickle.loads(pickle.dumps(fitted)).predict(x).tolist() == fitted.predict(x).tolist()


def test_skorchs_arguments_are_searched_by_scikit_learn() -> None:
    selection = pytest.importorskip("sklearn.model_selection")
    x, t = stacked()
    net = skorch_net(model().float(), criterion__curvature="hessian", predict_nonlinearity=None)
    grid = {"criterion__damping": ["auto", 0.1], "criterion__structure": ["mean", "isotropic"]}
    search = selection.GridSearchCV(net, grid, cv=2, scoring="accuracy", error_score="raise").fit(x.float(), t.numpy())
    assert len(search.cv_results_["params"]) == 4
    best = search.best_estimator_
    assert best.criterion_.extra_repr().startswith("cross_entropy, curvature='hessian'")
    assert best.score(x.float(), t.numpy()) > 0
