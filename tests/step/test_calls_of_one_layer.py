"""A layer that is called several times in one loss has one curvature: the step of the concatenated call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import newton_plugin as npl

Loss = Callable[[Sequence[Tensor]], Tensor]


def softplus_of_pair(y: Sequence[Tensor]) -> Tensor:
    """A discriminator's: positive and negative batch."""
    return F.softplus(-y[0]).mean() + F.softplus(y[1]).mean()


def triplet(y: Sequence[Tensor]) -> Tensor:
    return F.triplet_margin_loss(y[0], y[1], y[2], margin=3.0)


def goodness(y: Sequence[Tensor]) -> Tensor:
    """Forward-forward's."""
    return F.softplus(2 - y[0].square().mean(-1)).mean() + F.softplus(y[1].square().mean(-1) - 2).mean()


def contrast(y: Sequence[Tensor]) -> Tensor:
    a, b = (F.normalize(v, dim=-1) for v in y[:2])
    return F.cross_entropy(a @ b.T / 0.2, torch.arange(len(a)))


def cross_entropies(y: Sequence[Tensor]) -> Tensor:
    return F.cross_entropy(y[0], torch.arange(6) % 3) + 0.2 * F.cross_entropy(y[1], (torch.arange(6) + 1) % 3)


LOSSES = [softplus_of_pair, triplet, goodness, contrast, cross_entropies]
RULES: list[dict[str, Any]] = [
    {},
    {"structure": "mean"},
    {"damping": 0.1},
    {"curvature": "norm"},
    {"structure": "per_sample", "damping": 0.3},
]


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def gradients(loss: Loss, concatenated: bool, calls: int, sizes: Sequence[int], **options: Any) -> list[Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    hook = npl.LossHook(**options)
    found = []
    for _ in range(4):
        xs = [torch.randn(n, 5, dtype=torch.float64) for n in sizes[:calls]]
        net.zero_grad()
        outputs = net(torch.cat(xs)).split(list(sizes[:calls])) if concatenated else [net(x) for x in xs]
        hook(loss(outputs)).backward()
        found.append(flat(net))
        with torch.no_grad():
            for p in net.parameters():
                p -= 0.05 * p.grad  # type: ignore[operator]
    return found


@pytest.mark.parametrize("options", RULES, ids=str)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_calls_are_one_concatenated_call(loss: Loss, options: dict[str, Any]) -> None:
    calls = 3 if loss is triplet else 2
    apart = gradients(loss, False, calls, (6, 6, 6), **options)
    together = gradients(loss, True, calls, (6, 6, 6), **options)
    for a, b in zip(apart, together, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"curvature": "hessian", "damping": 0.1}], ids=str)
@pytest.mark.parametrize("loss", [softplus_of_pair, goodness], ids=lambda f: f.__name__)
def test_batches_of_different_size(loss: Loss, options: dict[str, Any]) -> None:
    apart = gradients(loss, False, 2, (6, 9), **options)
    together = gradients(loss, True, 2, (6, 9), **options)
    for a, b in zip(apart, together, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("structure", ["mean", "isotropic", "diagonal", "per_sample"])
@pytest.mark.parametrize("loss", [softplus_of_pair, goodness, cross_entropies], ids=lambda f: f.__name__)
def test_hessians_in_closed_form_and_by_products(loss: Loss, structure: str) -> None:
    options = {"curvature": "hessian", "structure": structure, "damping": 0.1}
    apart, together = (gradients(loss, c, 2, (6, 6), **options) for c in (False, True))
    for a, b in zip(apart, together, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_calls_that_the_loss_couples_have_no_hessian_of_each_sample() -> None:
    with pytest.raises(npl.BatchCoupledError):
        gradients(triplet, False, 3, (6, 6, 6), curvature="hessian", damping=0.1)


def test_calls_share_one_state_and_other_layers_have_their_own() -> None:
    torch.manual_seed(0)
    net, other, x = nn.Linear(5, 3), nn.Linear(5, 3), torch.randn(6, 5)
    hook = npl.LossHook()
    hook((net(x).exp() + net(-x).exp() + other(x).exp()).mean()).backward()
    assert sorted(b.calls for b in hook.boundaries) == [1, 2, 2]
    assert len(hook.state_dict()["rules"]) == 2


def test_a_call_of_one_row_and_one_feature_is_a_call() -> None:
    def run(concatenated: bool) -> Tensor:
        torch.manual_seed(0)
        net, x = nn.Linear(5, 1).double(), torch.randn(17, 5, dtype=torch.float64)
        a, b = net(x).split([16, 1]) if concatenated else (net(x[:16]), net(x[16:]))
        npl.LossHook()(F.softplus(-a).mean() + F.softplus(b).mean()).backward()
        return flat(net)

    torch.testing.assert_close(run(False), run(True), rtol=1e-10, atol=0)
