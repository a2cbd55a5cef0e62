"""``structure="gated"`` in a Trainer: it learns of the optimizer by itself, logs what it found, and resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.lightning.fits import Batches, plain_module, trainer
from torch import Tensor, nn

import newton_plugin as npl
from newton_plugin_lightning import NewtonLosses

STEPS = 30


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).double()


def _batches(count: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    """A third of the labels are wrong, so that the gate opens."""
    g = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        x = torch.randn(16, 6, generator=g, dtype=torch.float64)
        wrong = torch.rand(16, generator=g) < 0.33
        found.append((x, torch.where(wrong, torch.randint(4, (16,), generator=g), x[:, :4].argmax(1))))
    return found


def _loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def _module(pl: Any, optimizer: type[torch.optim.Optimizer], rate: float) -> Any:
    def configure(self: Any) -> torch.optim.Optimizer:
        return optimizer(self.parameters(), lr=rate)  # type: ignore[call-arg]

    return plain_module(pl, _network(), _loss, configure_optimizers=configure)


def _by_hand(optimizer: type[torch.optim.Optimizer], rate: float, size: Any) -> nn.Module:
    model, hook = _network(), npl.LossHook(curvature=npl.GatedFisher(size=size))
    own = optimizer(model.parameters(), lr=rate)  # type: ignore[call-arg]
    for batch in _batches():
        own.zero_grad()
        hook(_loss(model, batch)).backward()
        own.step()
    return model


@pytest.mark.parametrize(
    ("optimizer", "rate", "size"), [(torch.optim.SGD, 0.3, "plain"), (torch.optim.Adam, 1e-2, "signal")]
)
def test_the_size_is_that_of_the_optimizer(pl: Any, optimizer: Any, rate: float, size: str) -> None:
    module, newton = _module(pl, optimizer, rate), NewtonLosses(structure="gated")
    trainer(pl, newton).fit(module, Batches(_batches()))
    twin = _by_hand(optimizer, rate, size)
    for ours, theirs in zip(module.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert newton.hook.diagnostics()["gate"] > 0.1
    assert newton.hook.boundaries[0].last_layer == "a layer of 8 inputs and 4 outputs"


def test_resumed_to_the_bit(pl: Any, tmp_path: Path) -> None:
    whole = _module(pl, torch.optim.Adam, 1e-2)
    trainer(pl, NewtonLosses(structure="gated"), max_steps=STEPS).fit(whole, Batches(_batches()))
    first, path = trainer(pl, NewtonLosses(structure="gated"), max_steps=12), tmp_path / "half.ckpt"
    first.fit(_module(pl, torch.optim.Adam, 1e-2), Batches(_batches(12)))
    first.save_checkpoint(path)
    half = _module(pl, torch.optim.Adam, 1e-2)
    second = trainer(pl, NewtonLosses(structure="gated"), max_epochs=2)
    second.fit(half, Batches(_batches()[12:]), ckpt_path=path)
    for ours, theirs in zip(half.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_strategys_own_optimizer_does_no_harm(pl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unknown:
        """No optimizer of torch's, as far as anybody can see."""

    newton = NewtonLosses(structure="gated")
    known = newton.hook.set_optimizer
    monkeypatch.setattr(newton.hook, "set_optimizer", lambda optimizers: known([Unknown()]))  # type: ignore[list-item]
    trainer(pl, newton).fit(_module(pl, torch.optim.SGD, 0.1), Batches(_batches(3)))
    assert newton.hook.diagnostics()["fallbacks"] == 0
