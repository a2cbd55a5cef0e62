"""Scenarios with ``sync="lagged"``: two ranks, against the rule written by hand for one process."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tests.cases import CLASSES, FEATURES, curved
from tests.distributed.scenarios import BATCHES, assert_same_on_all_ranks, batch, gradients, leaves, network, scenario
from tests.distributed.scenarios import part as part_of
from tests.twins import relative_error
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import newton_plugin as npl
from newton_plugin._runtime.processes import current_ranks

LAGGED: dict[str, Any] = {"sync": "lagged"}
MORE = [*BATCHES, *(batch(seed) for seed in range(10, 14))]


class Twin:
    """The steps of one layer, from the statistics of the step before. One number a batch: the mean of ``|g|^2 / m``."""

    def __init__(self, curvature: str = "fisher", damping: float | None = None) -> None:
        self.curvature, self.damping = curvature, damping
        self.before: float | None = None
        self.running = self.count = self.slow = self.slow_count = 0.0

    def step(self, g: Tensor) -> Tensor:
        m = g.shape[1]
        own = float(g.square().sum(-1).mean()) / m
        used = own if self.before is None else self.before
        if own == own:  # not NaN
            self.before = own
        squared = g.square().sum(-1, keepdim=True)
        if self.curvature == "norm":
            return g / (squared + 0.1 * m * used).sqrt()
        if self.damping is not None:
            return g / (used + self.damping)
        if self.count:
            assert used < 10 * self.running / self.count  # no batch is cut down here
        self.running, self.count = used + 0.9 * self.running, 1 + 0.9 * self.count
        c = self.running / self.count
        self.slow, self.slow_count = c + 0.999 * self.slow, 1 + 0.999 * self.slow_count
        assert c > 1e-3 * self.slow / self.slow_count
        return g / (c + squared / m + 0.3 * c)


@scenario
def lagged_is_the_step_from_the_statistics_before(rank: int) -> None:
    rules: list[dict[str, Any]] = [{}, {"structure": "isotropic", "damping": 0.05}, {"curvature": "norm"}]
    for rule in rules:
        model, hook = DistributedDataParallel(network()), npl.LossHook(**rule, **LAGGED)
        alone, twin = network(), Twin(rule.get("curvature", "fisher"), rule.get("damping"))
        ours, theirs = (torch.optim.SGD(net.parameters(), lr=0.5) for net in (model, alone))
        for whole in MORE:
            x, t = part_of(rank, whole)
            ours.zero_grad()
            hook(curved(model(x), t)).backward()
            ours.step()
            theirs.zero_grad()
            y = alone(whole[0])
            (g,) = torch.autograd.grad(curved(y, whole[1]), y, retain_graph=True)
            y.backward(twin.step(g * len(g)) / len(g))
            theirs.step()
            assert relative_error(gradients(model), gradients(alone)) <= 1e-10, rule
        for value in leaves(hook.state_dict()):
            assert_same_on_all_ranks(value)


@scenario
def lagged_without_statistics_is_what_it_was(rank: int) -> None:
    """Each sample's own Fisher and a fixed damping need nobody."""
    rule = {"structure": "per_sample", "damping": 0.05}
    model, hook, twin = network(), npl.LossHook(**rule, **LAGGED), npl.LossHook(**rule, sync=False)
    for whole in BATCHES:
        x, t = part_of(rank, whole)
        model.zero_grad()
        hook(curved(model(x), t)).backward()
        ours = gradients(model)
        model.zero_grad()
        twin(curved(model(x), t)).backward()
        assert relative_error(ours, gradients(model)) <= 1e-12


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.main, self.other = nn.Linear(FEATURES, 6), nn.Linear(6, CLASSES), nn.Linear(6, 2)
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.trunk(x))
        return self.main(h), self.other(h)


def loss_of(outputs: tuple[Tensor, Tensor], t: Tensor) -> Tensor:
    return F.cross_entropy(outputs[0], t.argmax(-1)) + 3 * (outputs[1] - t[:, :2]).square().sum(-1).mean()


@scenario
def lagged_one_size_takes_the_gains_before(rank: int) -> None:
    model, hook, alone = DistributedDataParallel(Heads()), npl.LossHook(**LAGGED), Heads()
    twins, before = [Twin(), Twin()], None
    for whole in MORE:
        model.zero_grad()
        alone.zero_grad()
        x, t = part_of(rank, whole)
        hook(loss_of(model(x), t)).backward()
        outputs = alone(whole[0])
        g = [n * len(n) for n in torch.autograd.grad(loss_of(outputs, whole[1]), outputs, retain_graph=True)]
        steps = [twin.step(rows) for twin, rows in zip(twins, g, strict=True)]
        own = [float((a * b).sum() / a.square().sum()) for a, b in zip(g, steps, strict=True)]
        gains, before = before or own, own
        size = (CLASSES + 2) / (CLASSES / gains[0] + 2 / gains[1])
        sent = [step * (size / gain) / len(step) for step, gain in zip(steps, gains, strict=True)]
        torch.autograd.backward(outputs, sent)
        assert relative_error(gradients(model), gradients(alone)) <= 1e-10


@scenario
def lagged_passes_a_nan_over(rank: int) -> None:
    """The rank that has it keeps its gradient; the other steps. Both go on from the statistics before it."""
    hook, twin, model, alone = npl.LossHook(**LAGGED), Twin(), network(), network()
    for k, whole in enumerate(MORE):
        x, t = part_of(rank, whole)
        if k == 2:
            whole = (whole[0].clone(), whole[1])
            whole[0][-1, 0] = torch.nan
            x = part_of(rank, whole)[0]
        y = model(x)
        loss = curved(y, t)
        (plain,) = torch.autograd.grad(loss, y, retain_graph=True)
        sent: list[Tensor] = []
        hook(loss)
        y.register_hook(sent.append)
        loss.backward()
        whole_y = alone(whole[0])
        (g,) = torch.autograd.grad(curved(whole_y, whole[1]), whole_y)
        expected = twin.step(g * len(g))
        expected = part_of(rank, (expected, expected))[0] / len(x)
        if k == 2 and rank:
            assert torch.equal(sent[-1].nan_to_num(7.0), plain.nan_to_num(7.0))
        elif k == 2:
            assert bool(torch.isfinite(sent[-1]).all())
        else:
            assert relative_error(sent[-1], expected) <= 1e-10, k
    assert hook.diagnostics()["fallbacks"] == rank
    for name, value in hook.state_dict()["rules"]["output0"].items():
        if name != "kept":
            for leaf in leaves({"": value}):
                assert_same_on_all_ranks(leaf)


@scenario
def lagged_goes_on_from_a_checkpoint(rank: int) -> None:
    """Rank 0's, as checkpoints are; also a copy of the hook."""
    hook, model = npl.LossHook(**LAGGED), network()

    def step(hook: npl.LossHook, whole: tuple[Tensor, ...]) -> Tensor:
        model.zero_grad()
        x, t = part_of(rank, whole)
        hook(curved(model(x), t)).backward()
        return gradients(model)

    for whole in MORE[:4]:
        step(hook, whole)
    saved: list[Any] = [hook.state_dict() if rank == 0 else None]  # it talks to nobody
    copied = copy.deepcopy(hook)  # on rank 1 the sums of the last step are still under way
    dist.broadcast_object_list(saved)
    other = npl.LossHook(**LAGGED)
    other.load_state_dict(copy.deepcopy(saved[0]))
    for whole in MORE[4:]:
        expected = step(hook, whole)
        assert torch.equal(step(other, whole), expected)
        assert torch.equal(step(copied, whole), expected)


@scenario
def lagged_hooks_take_turns(rank: int) -> None:
    """Two hooks, as of a GAN: each has the statistics of its own step before."""
    hooks, twins = [npl.LossHook(**LAGGED) for _ in range(2)], [Twin(), Twin()]
    model, alone = network(), network()
    for k, whole in enumerate(MORE):
        which = k % 2 if k < 4 else 0
        model.zero_grad()
        alone.zero_grad()
        x, t = part_of(rank, whole)
        scale = 1.0 + 3 * which
        hooks[which](scale * curved(model(x), t)).backward()
        own = gradients(model)
        dist.all_reduce(own)
        y = alone(whole[0])
        (g,) = torch.autograd.grad(scale * curved(y, whole[1]), y, retain_graph=True)
        y.backward(twins[which].step(g * len(g)) / len(g))
        assert relative_error(own / 2, gradients(alone)) <= 1e-10, k


@scenario
def lagged_wrapped_loss(rank: int) -> None:
    wrapped, twin = npl.newton_loss(curved, **LAGGED), Twin()
    model, alone = network(), network()
    for whole in MORE:
        model.zero_grad()
        alone.zero_grad()
        x, t = part_of(rank, whole)
        wrapped(model(x), t).backward()
        own = gradients(model)
        dist.all_reduce(own)
        y = alone(whole[0])
        (g,) = torch.autograd.grad(curved(y, whole[1]), y, retain_graph=True)
        y.backward(twin.step(g * len(g)) / len(g))
        assert relative_error(own / 2, gradients(alone)) <= 1e-10


@scenario
def lagged_a_rank_without_samples(rank: int) -> None:
    hook, model = npl.LossHook(reduction="sum", **LAGGED), network()
    for whole in BATCHES:
        model.zero_grad()
        x, t = part_of(rank, whole, len(whole[0]))
        hook(8 * curved(model(x), t).nan_to_num()).backward()
        assert bool(torch.isfinite(gradients(model)).all())
        assert bool(gradients(model).any()) == (rank == 0)
    assert hook.diagnostics()["fallbacks"] == 0


@scenario
def lagged_takes_no_more_layers_than_fit(rank: int) -> None:
    torch.manual_seed(0)
    heads = nn.ModuleList(nn.Linear(FEATURES, 2) for _ in range(30)).double()
    x, _ = part_of(rank, BATCHES[0])
    with pytest.raises(npl.ArgumentError, match=r"up to 27 layers; got 30. Use sync=True"):
        npl.LossHook(**LAGGED)(torch.stack([head(x).square().mean() for head in heads]).sum())
    current_ranks(True).finish()
