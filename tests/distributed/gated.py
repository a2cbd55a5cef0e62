"""Scenarios of the rule that looks at the last layer: two ranks, against one process with the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.cases import CLASSES, FEATURES
from tests.distributed.scenarios import assert_same_on_all_ranks, gradients, network, part, scenario
from tests.twins import relative_error
from torch import Tensor, nn

import newton_plugin as npl

STEPS, BATCH = 40, 12


def labelled(seed: int) -> tuple[Tensor, Tensor]:
    """A third of the labels are wrong, so that the gate opens."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, FEATURES, generator=g, dtype=torch.float64)
    wrong = torch.rand(BATCH, generator=g) < 0.33
    return x, torch.where(wrong, torch.randint(CLASSES, (BATCH,), generator=g), x[:, :CLASSES].argmax(1))


def trained(rank: int | None, first: int, **options: Any) -> tuple[nn.Module, npl.LossHook]:
    """By ``first`` of the samples on rank 0; None: all samples in one process."""
    model, hook = network(), npl.LossHook(structure="gated", sync=rank is not None, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for seed in range(STEPS):
        whole = labelled(seed)
        x, t = whole if rank is None else part(rank, whole, first)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), t, reduction="sum") / (BATCH if rank is None else len(x))
        hook(loss if len(x) else 0 * loss.nan_to_num()).backward()
        if rank is not None:  # the mean over all samples, as one process has it
            for p in model.parameters():
                assert p.grad is not None
                p.grad.mul_(len(x) / BATCH)
                torch.distributed.all_reduce(p.grad)
        optimizer.step()
    return model, hook


@scenario
def the_gate_of_two_ranks_is_that_of_one_process(rank: int) -> None:
    twin, single = trained(None, 0)
    assert single.diagnostics()["gate"] > 0.2  # else the scenario says little
    for first in (BATCH // 2, 3):
        model, hook = trained(rank, first)
        flat = nn.utils.parameters_to_vector(model.parameters()).detach()
        assert_same_on_all_ranks(flat)
        assert relative_error(flat, nn.utils.parameters_to_vector(twin.parameters()).detach()) <= 1e-9
        for name in ("gate", "signal", "contradiction"):
            assert hook.diagnostics()[name] == pytest.approx(single.diagnostics()[name], abs=1e-9)


@scenario
def a_rank_without_samples_at_a_gate(rank: int) -> None:
    model, hook = network(), npl.LossHook(structure="gated", reduction="sum")
    x, t = part(rank, labelled(0), BATCH)
    loss = nn.functional.cross_entropy(model(x), t, reduction="sum")
    hook(loss if rank == 0 else loss.nan_to_num()).backward()
    if rank == 0:
        twin = network()
        own = npl.LossHook(structure="gated", reduction="sum", sync=False)
        own(nn.functional.cross_entropy(twin(x), t, reduction="sum")).backward()
        assert relative_error(gradients(model), gradients(twin)) <= 1e-12
    else:
        assert not gradients(model).any()


@scenario
def different_last_layers_are_an_error_on_all(rank: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, 5 + rank), nn.Linear(5 + rank, CLASSES)).double()
    x, t = part(rank, labelled(0))
    with pytest.raises(npl.RanksDisagreeError, match=r"5 inputs .*6 inputs"):
        npl.LossHook(structure="gated")(nn.functional.cross_entropy(model(x), t))


@scenario
def a_gate_is_not_lagged(rank: int) -> None:
    with pytest.raises(npl.ArgumentError, match=r"sync='lagged' takes .*isotropic"):
        npl.LossHook(structure="gated", sync="lagged")
