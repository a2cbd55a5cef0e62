"""How many vectors a batched Hessian-vector product takes at once: fewer where the loss's own graph is long."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests import twins
from torch import Tensor

import newton_plugin as npl
from newton_plugin._boundary.autograd_graph import elements_between
from newton_plugin._derivatives import sample_hessians

N, M = 4, 70  # so many that the graph is looked at


def chain(rounds: int) -> Any:
    """A loss of about three operations a round, each of which makes N m numbers; neighbours coupled."""

    def loss(y: Tensor) -> Tensor:
        z = y
        for _ in range(rounds):
            z = torch.sin(z + 0.1 * z.roll(1, -1))
        return (z + 0.5 * y.square()).sum(-1).mean()

    return loss


def outputs() -> Tensor:
    return torch.randn(N, M, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of vectors in every batched product, as autograd is asked for them."""
    taken: list[int] = []
    grad = torch.autograd.grad

    def counted(outputs: Any, inputs: Any, grad_outputs: Any = None, **options: Any) -> Any:
        if options.get("is_grads_batched"):
            taken.append(len(grad_outputs[0]))
        return grad(outputs, inputs, grad_outputs, **options)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    return taken


def graph_of(loss: Any, y: Tensor) -> int:
    y = y.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(y), y, create_graph=True)
    edge = torch.autograd.graph.get_gradient_edge(y)
    return elements_between(g, (edge.node, edge.output_nr))


@pytest.mark.parametrize("structure", ["mean", "per_sample", "isotropic"])
@pytest.mark.parametrize("share", [1, 3.5, 17, 1000])
def test_a_long_graph_takes_fewer_vectors_and_gives_the_same_step(
    monkeypatch: pytest.MonkeyPatch, at_once: list[int], structure: Any, share: float
) -> None:
    loss, y = chain(12), outputs()
    size = graph_of(loss, y)
    monkeypatch.setattr(sample_hessians, "_GRAPH_ELEMENTS", int(share * size))
    taken = npl.newton_step(loss, y, curvature="hessian", structure=structure, damping=0.5)
    products = at_once[1:]  # the first asks whether the samples are coupled
    # A little may be in one graph and not in the other: the copy that newton_step makes of the outputs.
    assert max(products) in {min(M, math.floor(k * share)) for k in (0.98, 1, 1.02)}
    assert sum(products) == M
    g, h = twins.gradients_and_hessians(loss, y)
    assert twins.relative_error(taken.step, twins.step(g, h, "hessian", structure, 1, 0.5)) <= 1e-10


def test_the_size_of_a_graph_grows_with_its_length_and_not_with_the_network() -> None:
    y = outputs()
    short, middle, long = (graph_of(chain(k), y) for k in (10, 20, 30))
    assert middle - short == long - middle
    assert 10 * N * M * 3 <= middle - short <= 10 * N * M * 20
    deep = y.clone().requires_grad_()
    z = deep
    for _ in range(50):
        z = z.sin()
    (g,) = torch.autograd.grad(chain(10)(z), z, create_graph=True)
    edge = torch.autograd.graph.get_gradient_edge(z)
    assert elements_between(g, (edge.node, edge.output_nr)) == short


def test_short_graphs_and_few_outputs_are_taken_at_once(at_once: list[int]) -> None:
    npl.newton_step(chain(1), outputs(), curvature="hessian", damping=0.5)
    npl.newton_step(chain(200), outputs()[:, :10], curvature="hessian", damping=0.5)
    assert at_once[1] == M
    assert at_once[3] == 10


def test_the_probes_of_a_sketch_are_taken_in_parts_too(monkeypatch: pytest.MonkeyPatch, at_once: list[int]) -> None:
    y = torch.randn(2, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    together = npl.newton_step(chain(5), y, curvature="hessian", damping=0.5).step
    assert at_once == [2, 32]
    monkeypatch.setattr(sample_hessians, "_GRAPH_ELEMENTS", 1)  # less than a single vector makes
    apart = npl.newton_step(chain(5), y, curvature="hessian", damping=0.5).step
    assert at_once[2:] == [2] + 32 * [1]
    assert twins.relative_error(apart, together) <= 1e-10


class TwoOutputs(torch.autograd.Function):
    """An operation of which one result has no gradient, and whose backward is differentiable."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor) -> Any:
        return y.square(), y.argmax(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return 2 * grads[0] * ctx.saved_tensors[0]


def test_functions_of_users_are_counted_as_well() -> None:
    loss, y = (lambda v: TwoOutputs.apply(v.sin())[0].sum()), outputs()
    assert graph_of(loss, y) >= 3 * N * M
    taken = npl.newton_step(lambda v: loss(v) / N, y, curvature="hessian", structure="per_sample", damping=1.0)
    g, h = twins.gradients_and_hessians(lambda v: v.sin().square().sum() / N, y)
    assert twins.relative_error(taken.step, twins.step(g, h, "hessian", "per_sample", 1, 1.0)) <= 1e-10
