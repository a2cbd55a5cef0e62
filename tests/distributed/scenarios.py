"""What two processes do together, against one process (or a formula) that sees the whole batch.

Each scenario runs on both ranks of a gloo group at once, and asserts on both. They are started together, once, by
``run_scenarios.py``; ``test_ranks.py`` shows the outcome of each.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tests.cases import CLASSES, FEATURES, curved
from tests.twins import gradients_and_hessians, power_solve, relative_error, step
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import newton_plugin as npl

SCENARIOS: dict[str, Callable[[int], None]] = {}
DAMPING = 0.05
N = 8  # samples of the whole batch


def scenario(function: Callable[[int], None]) -> Callable[[int], None]:
    SCENARIOS[function.__name__] = function
    return function


def network(outputs: int = CLASSES) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


def batch(seed: int = 0, n: int = N, outputs: int = CLASSES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, FEATURES, generator=generator, dtype=torch.float64)
    return x, torch.rand(n, outputs, generator=generator, dtype=torch.float64)


def part(rank: int, tensors: tuple[Tensor, ...], first: int = N // 2) -> tuple[Tensor, ...]:
    """The samples of one rank: ``first`` of them are rank 0's."""
    return tuple(t[:first] if rank == 0 else t[first:] for t in tensors)


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def assert_same_on_all_ranks(tensor: Tensor) -> None:
    """To the bit."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    assert all(torch.equal(p, parts[0]) for p in parts)


def alone(options: dict[str, Any], batches: list[tuple[Tensor, Tensor]], loss: Any = curved) -> Tensor:
    """Parameters after a step of SGD for each whole batch, in one process."""
    model, hook = network(batches[0][1].shape[1]), npl.LossHook(**options, sync=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for x, t in batches:
        optimizer.zero_grad()
        hook(loss(model(x), t)).backward()
        optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def together(
    rank: int, options: dict[str, Any], batches: list[tuple[Tensor, Tensor]], loss: Any = curved, **ddp: Any
) -> tuple[Tensor, npl.LossHook]:
    """The same, each rank with its half of every batch, under torch's own DDP."""
    model, hook = DistributedDataParallel(network(batches[0][1].shape[1]), **ddp), npl.LossHook(**options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for whole in batches:
        x, t = part(rank, whole, len(whole[0]) // 2)
        optimizer.zero_grad()
        hook(loss(model(x), t)).backward()
        optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach(), hook


BATCHES = [batch(seed) for seed in range(4)]
RULES: list[dict[str, Any]] = [
    {"curvature": curvature, "structure": structure, "power": power, "damping": damping}
    for curvature in ("fisher", "hessian")
    for structure in ("mean", "per_sample", "isotropic")
    for power in (1, 0.5)
    for damping in (DAMPING, "auto")
] + [{"curvature": "norm"}, {"curvature": "auto"}]


@scenario
def two_ranks_equal_one_process(rank: int) -> None:
    for rule in RULES:
        ours, hook = together(rank, rule, BATCHES)
        assert relative_error(ours, alone(rule, BATCHES)) <= 1e-10, rule
        assert_same_on_all_ranks(ours)
        for value in leaves(hook.state_dict()):
            assert_same_on_all_ranks(value)


def leaves(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from leaves(value)


class Towers(nn.Module):
    """Two heads, of which one is called twice; a loss weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.main, self.other = nn.Linear(FEATURES, 6), nn.Linear(6, CLASSES), nn.Linear(6, 2)
        self.s = nn.Parameter(torch.zeros(1))
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = torch.tanh(self.trunk(x))
        return self.main(h), self.main(-h), self.other(h), self.s * 1.0

    def loss_of(self, outputs: tuple[Tensor, ...], t: Tensor) -> Tensor:
        a, b, c, s = outputs
        return F.cross_entropy(a, t) + F.softplus(b).mean() + (-s).exp().sum() * 0.01 * c.square().mean() + s.sum()


@scenario
def one_size_for_all_boundaries_of_all_ranks(rank: int) -> None:
    """Several heads, two calls of one layer, a term beside them; at last a rank whose samples have no gradient."""
    for options in ({}, {"curvature": "norm"}, {"structure": "mean"}, {"damping": 0.1}):
        whole, alone_hook = Towers(), npl.LossHook(**options, sync=False)
        shared, hook = Towers(), npl.LossHook(**options)
        ddp = DistributedDataParallel(shared)
        for x, scores in BATCHES:
            t = scores.argmax(-1)
            whole.zero_grad()
            shared.zero_grad()
            alone_hook(whole.loss_of(whole(x), t)).backward()
            own_x, own_t = part(rank, (x, t))
            hook(shared.loss_of(ddp(own_x), own_t)).backward()
            assert relative_error(gradients(shared), gradients(whole)) <= 1e-9, options
        shared.zero_grad()
        x, scores = part(rank, BATCHES[0])
        hook(shared.loss_of(ddp(x), scores.argmax(-1)) * float(rank == 0)).backward()
        assert bool(torch.isfinite(gradients(shared)).all())
        assert_same_on_all_ranks(gradients(shared))
        assert hook.diagnostics()["fallbacks"] == 0


@scenario
def without_sync_each_rank_has_its_own_curvature(rank: int) -> None:
    rule = {"curvature": "fisher", "damping": DAMPING}
    ours, _ = together(rank, {**rule, "sync": False}, BATCHES)
    assert relative_error(ours, alone(rule, BATCHES)) > 1e-3


@scenario
def wide_outputs_go_by_push_through(rank: int) -> None:
    """1,100 features and 8 samples: no m x m matrix; with 1,200 samples, 600 on each rank, the dense one."""
    for n in (N, 1200):
        batches = [batch(seed, n, outputs=1100) for seed in range(2)]
        rule: dict[str, Any] = {"curvature": "fisher", "damping": 1e-4}
        loss = lambda y, t: ((y - t) ** 2).mean()  # noqa: E731
        ours, _ = together(rank, rule, batches, loss)
        assert relative_error(ours, alone(rule, batches, loss)) <= 1e-10, n


@scenario
def static_graph_and_unused_parameters(rank: int) -> None:
    rule = {"curvature": "fisher", "damping": DAMPING}
    for option in ("static_graph", "find_unused_parameters"):
        with expected_warnings("find_unused_parameters=True was specified"):
            ours, _ = together(rank, rule, BATCHES, **{option: True})
        assert relative_error(ours, alone(rule, BATCHES)) <= 1e-10, option


@contextmanager
def expected_warnings(*parts: str) -> Iterator[list[Any]]:
    """Warnings that contain one of ``parts`` are kept back; any other stays an error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught
    for warning in caught:
        assert any(p in str(warning.message) for p in parts), warning.message


@scenario
def unequal_parts_of_a_batch(rank: int) -> None:
    """6 and 2 samples. C is the mean over all 8; DDP then averages the ranks' mean gradients, as it does without us."""
    for curvature in ("fisher", "hessian"):
        whole = BATCHES[0]
        model = DistributedDataParallel(network())
        x, t = part(rank, whole, 6)
        hook = npl.LossHook(curvature=curvature, damping=DAMPING)
        hook(curved(model(x), t)).backward()

        twin = network()
        y = twin(whole[0])
        g, h = gradients_and_hessians(lambda v, t=whole[1]: curved(v, t), y)
        taken = step(g, h, curvature, "mean", 1, DAMPING)
        surrogate = 0.5 * (y - (y.detach() - taken)).square().sum(-1)
        (0.5 * surrogate[:6].mean() + 0.5 * surrogate[6:].mean()).backward()
        assert relative_error(gradients(model), gradients(twin)) <= 1e-10, curvature


@scenario
def a_rank_without_samples(rank: int) -> None:
    """Not an error, not a hang: its part of every sum is zero."""
    for curvature in ("fisher", "hessian", "norm"):
        model = network()
        x, t = part(rank, BATCHES[0], N)
        hook = npl.LossHook(curvature=curvature, damping=DAMPING, reduction="sum")
        hook(N * curved(model(x), t) if rank == 0 else curved(model(x), t).nan_to_num()).backward()
        if rank == 0:
            twin = network()
            npl.LossHook(curvature=curvature, damping=DAMPING, reduction="sum", sync=False)(
                N * curved(twin(x), t)
            ).backward()
            assert relative_error(gradients(model), gradients(twin)) <= 1e-10
        else:
            assert not gradients(model).any()


@scenario
def accumulation_under_no_sync(rank: int) -> None:
    """DDP talks at the last of four batches, the hook at each."""
    model, hook = DistributedDataParallel(network()), npl.LossHook(damping="auto")
    for k, whole in enumerate(BATCHES):
        x, t = part(rank, whole)
        if k < 3:
            with model.no_sync():
                (hook(curved(model(x), t)) / 4).backward()
        else:
            (hook(curved(model(x), t)) / 4).backward()
    twin, own = network(), npl.LossHook(damping="auto", sync=False)
    for x, t in BATCHES:
        (own(curved(twin(x), t)) / 4).backward()
    assert relative_error(gradients(model), gradients(twin)) <= 1e-10


@scenario
def a_nan_on_one_rank_is_the_same_decision_on_all(rank: int) -> None:
    """One process with the whole batch would keep the whole gradient as it is; so do both ranks, and go on after it."""
    for curvature in ("fisher", "hessian"):
        for structure in ("mean", "per_sample"):
            model = network()
            hook = npl.LossHook(curvature=curvature, structure=structure, damping="auto")
            for k, whole in enumerate(BATCHES):
                x, t = part(rank, whole)
                if k == 2 and rank == 1:
                    x = x.clone()
                    x[0, 0] = torch.nan
                model.zero_grad()
                y = model(x)
                loss = curved(y, t)
                (plain,) = torch.autograd.grad(loss, y, retain_graph=True)
                hook(loss)
                sent: list[Tensor] = []
                y.register_hook(sent.append)
                loss.backward()
                kept = torch.allclose(sent[-1], plain, rtol=1e-12, atol=0, equal_nan=True)
                assert kept == (k == 2), (curvature, structure, k)
            assert hook.diagnostics()["fallbacks"] == 1
            for value in leaves(hook.state_dict()):
                assert_same_on_all_ranks(value)


@scenario
def raising_on_nan_raises_everywhere(rank: int) -> None:
    x, t = part(rank, BATCHES[0])
    hook = npl.LossHook(on_nonfinite="raise")
    with pytest.raises(npl.NonFiniteError, match="in 4 of 4 samples" if rank else "or at another rank's message"):
        hook(curved(network()(x * (torch.nan if rank else 1)), t))


@scenario
def a_hessian_that_one_rank_lacks_is_fisher_on_all(rank: int) -> None:
    def loss(y: Tensor, t: Tensor) -> Tensor:
        return (Once.apply(y) - t if rank else y - t).square().sum(-1).mean()

    model, twin = DistributedDataParallel(network()), network()
    x, t = part(rank, BATCHES[0])
    with expected_warnings("empirical Fisher in place of Hessian") as caught:
        npl.LossHook(curvature="hessian", damping=DAMPING)(loss(model(x), t)).backward()
    assert len(caught) == 1, [str(c.message) for c in caught]
    whole = BATCHES[0]
    fisher = npl.LossHook(curvature="fisher", damping=DAMPING, sync=False)
    fisher((twin(whole[0]) - whole[1]).square().sum(-1).mean()).backward()
    assert relative_error(gradients(model), gradients(twin)) <= 1e-10


class Once(torch.autograd.Function):
    """The identity, differentiable once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@scenario
def a_zero_hessian_is_fisher_on_all(rank: int) -> None:
    def loss(y: Tensor, t: Tensor) -> Tensor:
        return (y - t).abs().sum(-1).mean()

    for structure in ("mean", "per_sample", "isotropic"):
        rule = {"curvature": "hessian", "structure": structure, "damping": DAMPING}
        with expected_warnings("the Hessian is zero"):
            ours, _ = together(rank, rule, BATCHES, loss)
        assert relative_error(ours, alone({**rule, "curvature": "fisher"}, BATCHES, loss)) <= 1e-10, structure


@scenario
def coupled_samples_are_refused_on_all(rank: int) -> None:
    """Rank 1 has one sample, which cannot be coupled with anything; it must not wait for ever either."""
    x, _ = part(rank, BATCHES[0], N - 1)
    y = network()(x)
    loss = y.sum(0).square().sum() if rank == 0 else y.square().sum()
    with pytest.raises(npl.BatchCoupledError, match="couples the samples" if rank == 0 else "another rank"):
        npl.LossHook(curvature="hessian")(loss)


@scenario
def different_boundaries_are_an_error_on_all(rank: int) -> None:
    """Two heads, of which each rank uses one; layers of different width; a rank that has no boundary at all."""
    heads = nn.ModuleList([network(CLASSES), network(CLASSES + rank)])
    x, _ = part(rank, BATCHES[0])
    losses = {
        "heads": heads[rank](x).square().mean(),
        "widths": heads[1](x).square().mean(),
        "nothing": heads[0](x).square().mean() if rank else torch.ones((), requires_grad=True).double().square(),
    }
    for loss in losses.values():
        with pytest.raises(npl.RanksDisagreeError, match=r"rank 0: .*; rank 1: .*sync=False"):
            npl.LossHook(module=heads)(loss)


@scenario
def sequences_of_different_length(rank: int) -> None:
    """(N, T, V) with another T on each rank: rows of V features, as many as there are tokens."""
    x, _ = batch(5, 12)
    t = torch.randint(0, CLASSES, (12,), generator=torch.Generator().manual_seed(6))
    own = slice(0, 8) if rank == 0 else slice(8, 12)
    model, twin = network(), network()
    y = model(x[own]).reshape(2, -1, CLASSES)  # 2 sequences of 4 tokens, or of 2
    loss = F.cross_entropy(y.flatten(0, 1), t[own], reduction="sum")
    npl.LossHook(feature_dims=-1, reduction="sum", damping=DAMPING)(loss).backward()
    for p in model.parameters():
        dist.all_reduce(p.grad)
    whole = F.cross_entropy(twin(x), t, reduction="sum")
    npl.LossHook(reduction="sum", damping=DAMPING, sync=False)(whole).backward()
    assert relative_error(gradients(model), gradients(twin)) <= 1e-10


@scenario
def the_decorator_too(rank: int) -> None:
    for curvature in ("fisher", "hessian"):
        wrapped = npl.newton_loss(curved, curvature=curvature, damping="auto")
        single = npl.newton_loss(curved, curvature=curvature, damping="auto", sync=False)
        model, twin = DistributedDataParallel(network()), network()
        for whole in BATCHES:
            x, t = part(rank, whole)
            wrapped(model(x), t).backward()
            single(twin(whole[0]), whole[1]).backward()
        assert relative_error(gradients(model), gradients(twin)) <= 1e-10, curvature


@scenario
def a_curvature_of_the_users_own(rank: int) -> None:
    """Without an argument ``ranks`` it cannot be averaged, and says so; with it, it is."""

    class Trace(npl.EmpiricalFisher):
        def step(self, gradient, hvp, damping):  # type: ignore[no-untyped-def, override]
            return super().step(gradient, hvp, damping)

    class Mean(npl.EmpiricalFisher):
        def step(self, gradient, hvp, damping, ranks):  # type: ignore[no-untyped-def, override]
            scale = ranks.mean(gradient.square().sum(), len(gradient))
            result = super().step(gradient, hvp, damping, ranks)
            result.step = gradient / scale
            return result

    x, t = part(rank, BATCHES[0])
    loss = curved(network()(x), t)
    with pytest.raises(npl.ArgumentError, match="takes no argument `ranks`"):
        npl.LossHook(curvature=Trace())(loss)
    npl.LossHook(curvature=Trace(), sync=False)(loss)
    model, twin = DistributedDataParallel(network()), network()
    npl.LossHook(curvature=Mean())(curved(model(x), t)).backward()
    y = twin(BATCHES[0][0])
    g, _ = gradients_and_hessians(lambda v: curved(v, BATCHES[0][1]), y)
    y.backward(g / (g.square().sum() / N) / N)
    assert relative_error(gradients(model), gradients(twin)) <= 1e-10


def sharded(version: int) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A network under FSDP, and how to gather its parameters."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    model = network()
    if version == 2:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for part_of_it in (model[0], model[2], model):  # type: ignore[index]
            fully_shard(part_of_it, mesh=mesh)  # type: ignore[arg-type]
        return model, lambda m: torch.cat([p.full_tensor().flatten() for p in m.parameters()]).detach()  # type: ignore[attr-defined]
    with expected_warnings("FSDP will not all-gather", "FSDP"):
        wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)

    def gather(m: nn.Module) -> Tensor:
        with FullyShardedDataParallel.summon_full_params(m):
            return nn.utils.parameters_to_vector(m.parameters()).detach().clone()

    return wrapped, gather


@scenario
def fully_sharded_networks(rank: int) -> None:
    """FSDP2 needs nothing; the first FSDP needs a copy of its outputs, and the hook says so."""
    for version in (1,) if torch.__version__.startswith("2.6.") else (2, 1):  # torch 2.6's FSDP2 has no CPU backend
        for curvature in ("fisher", "hessian"):
            rule = {"curvature": curvature, "damping": DAMPING}
            model, gather = sharded(version)
            hook = npl.LossHook(**rule)  # type: ignore[arg-type]
            optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
            with expected_warnings("FSDP", "_get_pg_default_device", "deprecated"):
                for k, whole in enumerate(BATCHES):
                    x, t = part(rank, whole)
                    optimizer.zero_grad()
                    y = model(x)
                    if version == 1 and k == 0:
                        with pytest.raises(npl.NoBoundaryError, match=r"model\(x\).clone\(\)"):
                            hook(curved(y, t))
                    hook(curved(y.clone() if version == 1 else y, t)).backward()
                    optimizer.step()
                ours = gather(model)
            assert relative_error(ours, alone(rule, BATCHES)) <= 1e-10, (version, curvature)


@scenario
def a_step_as_a_function_stays_local(rank: int) -> None:
    """``newton_step`` may be called on one rank only."""
    if rank == 0:
        y, t = torch.randn(4, 3, dtype=torch.float64), torch.rand(4, 3, dtype=torch.float64)
        taken = npl.newton_step(curved, y, t, damping=DAMPING)
        g, _ = gradients_and_hessians(lambda v: curved(v, t), y)
        c = g.T @ g / 4
        assert relative_error(taken.step, torch.stack([power_solve(c, DAMPING, v, 1) for v in g])) <= 1e-10
    dist.barrier()
