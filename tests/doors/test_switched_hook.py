"""``LossHook(enabled=...)``: plain training while it is off, the running state kept."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import newton_plugin as npl


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


def gradient(hook: npl.LossHook | None, net: Net, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x, target = torch.randn(8, 4, generator=generator), torch.randint(0, 3, (8,), generator=generator)
    net.zero_grad()
    loss = F.cross_entropy(net(x), target)
    (loss if hook is None else hook(loss)).backward()
    assert net.head.weight.grad is not None
    return net.head.weight.grad.clone()


def tensors(state: Any) -> list[Any]:
    if isinstance(state, dict):
        return [leaf for value in state.values() for leaf in tensors(value)]
    return [torch.as_tensor(float("nan") if state is None else state)] if not isinstance(state, str) else []


@pytest.mark.parametrize("rule", [{}, {"structure": "gated"}, {"curvature": "hessian"}], ids=str)
@pytest.mark.parametrize("boundary", ["auto", "head"])
def test_off_it_is_plain_and_on_again_it_goes_on(boundary: str, rule: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = Net()
    hook = npl.LossHook(boundary=boundary, module=net, **rule)
    never = npl.LossHook(boundary=boundary, module=net, **rule)  # sees the batches of the steps that are taken alone
    for seed in (0, 1):
        assert torch.equal(gradient(hook, net, seed), gradient(never, net, seed))
    before = copy.deepcopy(hook.state_dict())
    hook.enabled = False
    for seed in (2, 3):
        assert torch.equal(gradient(hook, net, seed), gradient(None, net, seed))
    after = tensors(hook.state_dict())
    assert len(after) == len(tensors(before)) > 3
    assert all(map(functools.partial(torch.allclose, equal_nan=True, rtol=0, atol=0), tensors(before), after))
    hook.enabled = True
    step = gradient(hook, net, 4)
    assert torch.equal(step, gradient(never, net, 4))
    assert not torch.equal(step, gradient(None, net, 4))


def test_off_nothing_of_the_graph_is_kept() -> None:
    """A named part records what it returns, which would keep the graphs of many batches."""
    net = Net()
    hook = npl.LossHook(boundary="head", module=net, enabled=False)
    hook(net(torch.randn(8, 4)).square().mean())
    recorded = [finder._recorder.recorded for finder in hook._search.finders]  # type: ignore[attr-defined]
    assert recorded == [{}]


def test_off_a_loss_without_outputs_is_no_error() -> None:
    loss = nn.Linear(1, 1).weight.sum()
    assert npl.LossHook(enabled=False)(loss) is loss


def test_the_argument() -> None:
    assert "enabled=False" in repr(npl.LossHook(enabled=False))
    assert "enabled" not in repr(npl.LossHook())
    with pytest.raises(npl.ArgumentTypeError, match="enabled must be True or False; got 1 of type int"):
        npl.LossHook(enabled=1)  # type: ignore[arg-type]
