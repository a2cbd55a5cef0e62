"""Scenarios about what travels: how often the ranks talk at a step, and what happens where they disagree."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.cases import CLASSES, FEATURES, curved
from tests.distributed.scenarios import (
    BATCHES,
    Towers,
    alone,
    assert_same_on_all_ranks,
    gradients,
    leaves,
    network,
    part,
    scenario,
    together,
)
from tests.twins import relative_error
from torch import Tensor, nn

import newton_plugin as npl
from newton_plugin._runtime.agreement import Verdict
from newton_plugin._runtime.processes import ProcessGroup, current_ranks

COLLECTIVES = ("all_reduce", "all_gather", "all_gather_object", "broadcast", "all_to_all", "barrier")
FEW: list[dict[str, Any]] = [
    {"structure": "isotropic"},
    {"structure": "isotropic", "damping": 0.05},
    {"curvature": "norm"},
    {"curvature": "norm", "damping": 0.05},
    {"structure": "per_sample"},
    {"structure": "per_sample", "power": 0.5, "damping": 0.05},
    {"structure": "isotropic", "power": 0.5},
]


@contextmanager
def counted() -> Iterator[list[int]]:
    """The bytes of every collective inside that our package asks for."""
    calls: list[int] = []

    def wrap(collective: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensor = args[0] if args else None
            calls.append(tensor.numel() * tensor.element_size() if isinstance(tensor, Tensor) else 0)
            return collective(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in COLLECTIVES:
            patch.setattr(dist, name, wrap(getattr(dist, name)))
        yield calls


def of_one_step(options: dict[str, Any], model: nn.Module, loss_of: Any, inputs: tuple[Tensor, ...]) -> list[int]:
    """Collectives of the second step of a hook."""
    hook = npl.LossHook(**options)
    hook(loss_of(model, *inputs)).backward()
    with counted() as calls:
        hook(loss_of(model, *inputs)).backward()
    return calls


class ManyHeads(nn.Module):
    """More layers than fit into the first all-reduce of a step."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads = nn.ModuleList(nn.Linear(FEATURES, 2) for _ in range(heads)).double()

    def loss_of(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.stack([(head(x) - t[:, :2]).square().mean() for head in self.heads]).sum()


@scenario
def collectives_of_a_step(rank: int) -> None:
    """Counted. The first has a size that settings alone decide."""
    x, t = part(rank, BATCHES[0])

    def one(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
        return curved(model(x), t)

    for options in FEW:
        assert of_one_step(options, network(), one, (x, t)) == [1024], options
        assert of_one_step({**options, "sync": False}, network(), one, (x, t)) == [], options
        assert of_one_step({**options, "sync": "lagged"}, network(), one, (x, t)) == [1024], options
    matrix = 8 * (CLASSES**2 + 1)
    assert of_one_step({"structure": "mean"}, network(), one, (x, t)) == [16, matrix]
    assert of_one_step({"structure": "gated"}, network(), one, (x, t))[:2] == [16, 16]  # agreement, then sum |g|^2
    assert len(of_one_step({"structure": "gated"}, network(), one, (x, t))) == 3
    assert of_one_step({"structure": "diagonal"}, network(), one, (x, t)) == [16, 8 * (CLASSES + 1)]
    assert of_one_step({"curvature": "hessian"}, network(), one, (x, t)) == [1024, matrix, 4]
    assert len(of_one_step({"curvature": "hessian", "structure": "per_sample"}, network(), one, (x, t))) == 4
    wide = torch.rand(len(x), 1100, dtype=torch.float64)
    assert len(of_one_step({"structure": "mean"}, network(1100), one, (x, wide))) == 4  # and the rows of all ranks

    def towers(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
        assert isinstance(model, Towers)
        return model.loss_of(model(x), t.argmax(-1))

    heads = 2  # layers with a step of their own, and s beside them
    assert len(of_one_step({"structure": "isotropic", "damping": 0.05}, Towers(), towers, (x, t))) == 1
    gains = of_one_step({"structure": "isotropic"}, Towers(), towers, (x, t))
    assert gains[0] == 1024
    assert len(gains) == 2
    assert gains[1] >= heads * 16
    assert len(of_one_step({"sync": "lagged"}, Towers(), towers, (x, t))) == 1
    assert len(of_one_step({"structure": "mean"}, Towers(), towers, (x, t))) == 3
    many = ManyHeads(60)
    assert len(of_one_step({"structure": "isotropic"}, many, lambda m, x, t: m.loss_of(x, t), (x, t))) == 3


@scenario
def more_layers_than_fit(rank: int) -> None:
    for options in ({}, {"structure": "mean"}, {"curvature": "hessian"}):
        ours, whole = ManyHeads(60), ManyHeads(60)
        x, t = part(rank, BATCHES[0])
        npl.LossHook(**options)(ours.loss_of(x, t)).backward()
        npl.LossHook(**options, sync=False)(whole.loss_of(*BATCHES[0])).backward()
        own = gradients(ours)
        dist.all_reduce(own)
        assert relative_error(own / 2, gradients(whole)) <= 1e-10, options


@contextmanager
def news_later() -> Iterator[None]:
    """As on an accelerator: where it need not, nobody waits to learn whether the ranks agree."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "newton_plugin._step.exchange.waits_for_news",
            lambda device, settings: settings.one_number and settings.on_nonfinite == "keep",
        )
        yield
        current_ranks(True).finish()


@scenario
def steps_that_do_not_wait_to_agree(rank: int) -> None:
    """The same numbers as where they do."""
    with news_later():
        for rule in FEW:
            ours, hook = together(rank, rule, BATCHES)
            assert relative_error(ours, alone(rule, BATCHES)) <= 1e-10, rule
            for value in leaves(hook.state_dict()):
                assert_same_on_all_ranks(value)


@scenario
def a_disagreement_that_is_read_at_the_next_call(rank: int) -> None:
    """Until then no rank takes a step, and none waits for a collective that another does not know of."""
    x, _ = part(rank, BATCHES[0])

    def heads(model: Towers) -> Tensor:
        a, b, c, _ = model(x)
        return a.square().mean() if rank else b.square().mean() + 3 * c.square().mean()

    def widths(model: Towers) -> Tensor:
        return model(x)[0].square().mean() if rank else model(x)[2].square().mean()

    def refused(model: Towers) -> Tensor:
        return Refusing.apply(model(x)[0]).square().mean() if rank else model(x)[0].square().mean()

    def nothing(model: Towers) -> Tensor:
        return model(x)[0].square().mean() if rank else torch.zeros((), requires_grad=True, dtype=torch.float64)

    with news_later():
        for options in ({"structure": "isotropic"}, {"curvature": "norm"}, {"sync": "lagged"}):
            for loss_of in (heads, widths, nothing, refused):
                model, plain, hook = Towers(), Towers(), npl.LossHook(**options)
                hook(model(x)[0].square().mean())  # the same on all ranks
                loss = loss_of(model)
                if loss_of is refused and rank:
                    with pytest.raises(RuntimeError, match="no gradient today"):
                        hook(loss)
                else:
                    hook(loss).backward()
                    loss_of(plain).backward()
                    if loss.grad_fn is not None and options.get("sync") != "lagged":
                        assert relative_error(gradients(model), gradients(plain)) <= 1e-12, (options, loss_of)
                with pytest.raises(npl.RanksDisagreeError, match=r"rank 0: .*; rank 1: .*sync=False"):
                    hook(model(x)[0].square().mean())
                hook(model(x)[0].square().mean()).backward()  # and on
                current_ranks(True).finish()


class Refusing(torch.autograd.Function):
    """The identity, whose backward pass fails."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Tensor:
        raise RuntimeError("no gradient today")


@scenario
def an_error_of_one_rank_is_told_to_all(rank: int) -> None:
    """Its loss cannot be differentiated. The others would wait for its part of the sums."""
    x, t = part(rank, BATCHES[0])
    for options in ({}, {"structure": "mean"}, {"curvature": "hessian"}):
        y = network()(x)
        with pytest.raises(npl.RanksDisagreeError, match=r"rank 1: RuntimeError: no gradient today"):
            npl.LossHook(**options)(curved(Refusing.apply(y) if rank else y, t))


@scenario
def what_one_rank_alone_cannot_use_is_told_to_all(rank: int) -> None:
    """By the checks of both doors, before a step begins. All ranks raise, and go on together."""
    x, t = part(rank, BATCHES[0])

    def without_graph(y: Tensor, t: Tensor) -> Tensor:
        return curved(y.detach() if rank else y, t)

    def without_outputs(y: Tensor, t: Tensor) -> Tensor:
        return y.new_zeros(()).requires_grad_() * 2 if rank else curved(y, t)

    def of_two_rows(y: Tensor, t: Tensor) -> Tensor:
        return (y - t).square().sum(-1)[: 2 if rank else None]

    for options in ({}, {"structure": "mean"}, {"curvature": "hessian"}):
        wrapped: list[Any] = [npl.newton_loss(f, **options) for f in (without_graph, without_outputs, of_two_rows)]
        for loss in wrapped:
            with pytest.raises(npl.RanksDisagreeError, match=r"rank 1: (NoGradient|NoBoundary|Shape)Error"):
                loss(network()(x), t)
        with pytest.raises(npl.RanksDisagreeError, match=r"rank 1: NoGradientError"):
            npl.newton_loss(curved, **options)(network()(x).detach() if rank else network()(x), t)
        with pytest.raises(npl.RanksDisagreeError, match=r"rank 1: NoGradientError"):
            npl.LossHook(**options)(without_graph(network()(x), t))
        y = network()(x)
        y = y if rank else y.unsqueeze(-1) * torch.ones(1, 1, 2, dtype=y.dtype)
        with pytest.raises(npl.RanksDisagreeError, match=r"rank 1: ShapeError"):
            npl.newton_loss(lambda y: y.square().mean(), feature_dims=2, **options)(y)
        together(rank, options, BATCHES[:1])


class Copied:
    """Of a verdict that an accelerator has copied to the host."""

    def synchronize(self) -> None: ...


@scenario
def sums_taken_in_by_one_rank_alone_change_no_order(rank: int) -> None:
    """Rank 0 saves a checkpoint between two lagged steps. What the ranks disagreed on before is read at one call."""
    group = current_ranks(True)
    assert isinstance(group, ProcessGroup)
    numbers, delivered = torch.ones(2, dtype=torch.float64), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Verdict, "of", staticmethod(lambda agreed, what: Verdict(agreed, what, Copied())))
        group.start("ours" if rank else "theirs", numbers, delivered.append)
        group.start("the same", numbers, delivered.append)
        if rank == 0:
            group.finish()
        with pytest.raises(npl.RanksDisagreeError, match="rank 0: theirs; rank 1: ours"):
            group.start("the same", numbers, delivered.append)
        group.start("the same", numbers, delivered.append)
        group.settle()
        group.settle()
    assert delivered[0].isnan().all()
    assert all(sums.tolist() == [2, 2] for sums in delivered[1:])
