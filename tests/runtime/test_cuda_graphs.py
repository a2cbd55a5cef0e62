"""Running states in a CUDA graph, on the CPU as if it were captured. Replays on a device are tested in tests/cuda."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import newton_plugin as npl
from newton_plugin._curvature.running_mean import RunningMean


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("_curvature.running_mean", "_runtime.cuda_graphs"):
        monkeypatch.setattr(f"newton_plugin.{module}.capturing", lambda tensor: True)


def _values(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(3, 3, generator=generator, dtype=torch.float64) for _ in range(count)]
    values[3] = values[3] * 1e6  # scaled down
    values[4] = values[4] * torch.inf  # left out
    return values


def test_the_mean_stays_where_it_is_and_is_the_same(request: pytest.FixtureRequest) -> None:
    ordinary, pinned, values = RunningMean(), RunningMean(), _values(8)
    ordinary.update(values[0], 0.9, 10.0), pinned.update(values[0], 0.9, 10.0)
    assert pinned.norm() is not None  # computed before the capture and kept: a replay must not read it
    request.getfixturevalue("captured")
    before = [id(pinned._mean), id(pinned._count)]
    for value in values[1:]:
        assert torch.equal(pinned.update(value, 0.9, 10.0), ordinary.update(value, 0.9, 10.0))
        assert torch.equal(pinned.norm(), ordinary.norm())
        assert [id(pinned._mean), id(pinned._count)] == before


def test_a_step_after_the_capture_leaves_the_graph_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    mean, values = RunningMean(), _values(8)
    mean.update(values[0], 0.9)
    with monkeypatch.context() as patch:
        patch.setattr("newton_plugin._curvature.running_mean.capturing", lambda tensor: True)
        mean.update(values[1], 0.9)
    before, state = id(mean._mean), mean.state_dict()
    kept = state["mean"].clone()
    mean.update(values[2], 0.9)
    assert id(mean._mean) == before
    assert torch.equal(state["mean"], kept)  # a state that was handed out does not change


@pytest.mark.usefixtures("captured")
def test_what_a_replay_could_not_repeat_is_refused() -> None:
    torch.manual_seed(0)
    model, x, t = nn.Linear(4, 3), torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    with pytest.raises(npl.CaptureError, match=r"before the mean was there.*Take a step"):
        npl.LossHook()(F.cross_entropy(model(x), t)).backward()
    kept = npl.LossHook(curvature=npl.EmpiricalFisher("mean", refresh_every=5), damping=0.1)
    with pytest.raises(npl.CaptureError, match="refresh_every=5 counts steps in Python"):
        kept(F.cross_entropy(model(x), t)).backward()


def test_a_state_that_was_handed_out_keeps_its_counts() -> None:
    torch.manual_seed(0)
    model, x, t = nn.Linear(4, 3), torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    hook = npl.LossHook(damping=0.1)

    def step(scale: float) -> None:
        hook(scale * F.cross_entropy(model(x), t)).backward()

    step(torch.inf)
    state = hook.state_dict()
    fresh = npl.LossHook(damping=0.1)
    fresh.load_state_dict(state)
    step(torch.inf)
    assert hook.diagnostics()["fallbacks"] == 2
    for _ in range(3):
        fresh(torch.inf * F.cross_entropy(model(x), t)).backward()
    again = npl.LossHook(damping=0.1)
    again.load_state_dict(state)
    step(1.0), again(F.cross_entropy(model(x), t)).backward()
    assert again.diagnostics()["fallbacks"] == 1
