"""structure="diagonal" and "block" by their definitions, through both doors; the forms of C and their inverses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests import twins
from torch import Tensor, nn

import newton_plugin as npl
from newton_plugin._derivatives.sample_hessians import SampleHessians
from newton_plugin._linalg.matrices import Dense, Diagonal, Isotropic, to_blocks, to_rows

G = torch.Generator().manual_seed(0)
N, T, V = 5, 3, 4
SEQUENCES = torch.randn(N, T, V, generator=G, dtype=torch.float64)
TOKENS = torch.randint(V, (N, T), generator=G)


def sequence_loss(y: Tensor) -> Tensor:
    """Indefinite, no closed form; every position has a curvature of its own."""
    place = torch.arange(1, T + 1, dtype=y.dtype).unsqueeze(-1)
    return ((place * y).sin() + 0.3 * y.square() + 0.2 * y * y.roll(1, -1)).sum(-1).mean()


def cross_entropy(y: Tensor) -> Tensor:
    return F.cross_entropy(y.movedim(-1, 1), TOKENS)


def rows(loss: Any, y: Tensor) -> tuple[Tensor, Tensor]:
    """g and H of every position of every sample, (N T, V) and (N T, V, V)."""
    flat = y.reshape(-1, V)
    return twins.gradients_and_hessians(lambda v: loss(v.reshape(y.shape)), flat)


def own_matrices(g: Tensor, h: Tensor, curvature: str) -> Tensor:
    return h if curvature == "hessian" else torch.stack([torch.outer(x, x) for x in g])


@pytest.mark.parametrize("curvature", ["fisher", "hessian"])
@pytest.mark.parametrize("structure", ["diagonal", "block"])
@pytest.mark.parametrize("power", [1, 0.5])
@pytest.mark.parametrize("loss", [sequence_loss, cross_entropy])
def test_both_doors_equal_the_definition(curvature: str, structure: str, power: float, loss: Any) -> None:
    g, h = rows(loss, SEQUENCES)
    own = own_matrices(g, h, curvature)
    theirs = torch.empty_like(g)
    for i in range(N * T):
        same = [own[j] for j in range(N * T) if structure == "diagonal" or j % T == i % T]
        c = sum(same) / len(same)  # type: ignore[operator]
        c = torch.diag(c.diagonal()) if structure == "diagonal" else c
        theirs[i] = twins.power_solve(c, 0.1, g[i], power)
    theirs = theirs.reshape(N, T, V)

    options: Any = {"curvature": curvature, "structure": structure, "power": power, "damping": 0.1, "feature_dims": -1}
    assert twins.relative_error(npl.newton_step(loss, SEQUENCES, **options).step, theirs) <= 1e-10
    y = SEQUENCES.clone().requires_grad_()
    npl.LossHook(**options)(loss(y * 1)).backward()
    assert y.grad is not None
    assert twins.relative_error(y.grad * N * T, theirs) <= 1e-10
    y.grad = None
    npl.newton_loss(loss, **options)(y).backward()
    assert y.grad is not None
    assert twins.relative_error(y.grad * N * T, theirs) <= 1e-10


def test_blocks_of_images() -> None:
    """(N, C, H, W) with feature_dims=1: one C x C matrix for each pixel."""
    y = torch.randn(6, 3, 2, 2, generator=G, dtype=torch.float64)
    loss = lambda v: (v.cosh().sum(1) + 0.1 * v.prod(1)).mean()  # noqa: E731
    taken = npl.newton_step(loss, y, curvature="hessian", structure="block", feature_dims=1, damping=0.1)
    assert taken.curvature is not None
    assert taken.curvature.shape == (4, 3, 3)
    pixel = npl.newton_step(
        lambda v: (v.cosh().sum(1) + 0.1 * v.prod(1)).mean(), y[:, :, 1, 0], curvature="hessian", damping=0.1
    )
    assert twins.relative_error(taken.step[:, :, 1, 0], pixel.step) <= 1e-10
    assert twins.relative_error(taken.curvature[2], pixel.curvature) <= 1e-10


def test_one_block_is_the_mean() -> None:
    y = SEQUENCES[:, 0]
    for curvature in ("fisher", "hessian"):
        options: Any = {"curvature": curvature, "damping": 0.1}
        mean = npl.newton_step(lambda v: v.cosh().sum(-1).mean(), y, **options)
        block = npl.newton_step(lambda v: v.cosh().sum(-1).mean(), y, structure="block", **options)
        assert torch.equal(mean.step, block.step)


@pytest.mark.parametrize("structure", ["diagonal", "block"])
@pytest.mark.parametrize("curvature", ["fisher", "hessian"])
def test_automatic_damping_is_relative_to_the_whole(structure: Any, curvature: str) -> None:
    """One damping for all blocks, from the root-mean-square eigenvalue of the block-diagonal matrix."""
    g, h = rows(sequence_loss, SEQUENCES)
    own = own_matrices(g, h, curvature)
    c = to_blocks(own.flatten(1), T).mean(1).reshape(T, V, V) if structure == "block" else own.mean(0)
    size = float(c.norm()) / (T * V) ** 0.5 if structure == "block" else float(c.diagonal().norm()) / V**0.5
    damping = npl.AutoDamping(0.3, own=0)
    taken = npl.newton_step(
        sequence_loss, SEQUENCES, curvature=curvature, structure=structure, damping=damping, feature_dims=-1
    )
    assert abs(float(taken.damping) - 0.3 * size) <= 1e-12


@pytest.mark.parametrize("structure", ["diagonal", "block", "mean", "isotropic", "per_sample"])
def test_known_blocks_take_no_products(structure: Any) -> None:
    g = torch.randn(6, V, generator=G, dtype=torch.float64)
    h = torch.randn(6, V, V, generator=G, dtype=torch.float64)
    h = h + h.mT

    def refuse(v: Tensor) -> Tensor:
        raise AssertionError("a product was taken")

    known = SampleHessians(refuse, blocks=lambda: h, independent=True)
    plain = lambda v: torch.einsum("nij,knj->kni", h, v)  # noqa: E731
    ours, theirs = (npl.Hessian(structure).step(g, hvp, npl.Tikhonov(0.1), groups=3) for hvp in (known, plain))
    assert twins.relative_error(ours.step, theirs.step) <= 1e-12


@pytest.mark.parametrize(
    "form",
    [
        Isotropic(torch.tensor(-2.0, dtype=torch.float64)),
        Diagonal(torch.tensor([3.0, -0.05, 1, 2], dtype=torch.float64)),
        Diagonal(torch.tensor([3.0, -2, 1, 2], dtype=torch.float64)),
        Dense(torch.diag(torch.tensor([3.0, -2, 1, 2], dtype=torch.float64)) + 0.1),
        Dense(torch.eye(4, dtype=torch.float64) + 0.1, definite=True),
    ],
)
@pytest.mark.parametrize("power", [1, 0.5])
def test_forms_are_inverted_as_the_matrices_they_stand_for(form: Any, power: float) -> None:
    matrix = form.matrix
    matrix = matrix * torch.eye(4).double() if matrix.ndim == 0 else torch.diag(matrix) if matrix.ndim == 1 else matrix
    g, d = SEQUENCES[0], torch.tensor(0.1, dtype=torch.float64)
    theirs = torch.stack([twins.power_solve(matrix, 0.1, x, power) for x in g])
    assert twins.relative_error(form.inverse(d, power)(g), theirs) <= 1e-12
    values = torch.linalg.eigvalsh(matrix)
    assert abs(float(form.scale() - values.square().mean().sqrt())) <= 1e-12
    low, high = form.extremes()
    assert abs(float(low - values[0])) + abs(float(high - values[-1])) <= 1e-12


def test_an_indefinite_block_is_repaired_alone() -> None:
    blocks = torch.stack([torch.eye(2), -torch.eye(2), torch.diag(torch.tensor([2.0, -0.01]))]).double()
    g, d = torch.ones(6, 2, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)
    solved = Dense(blocks).inverse(d, 1)(g)
    expected = torch.tensor([[1 / 1.1, 1 / 1.1], [1 / 1.1, 1 / 1.1], [1 / 2.1, 1 / 0.09]]).double().repeat(2, 1)
    assert twins.relative_error(solved, expected) <= 1e-6


def test_rows_and_blocks() -> None:
    r = torch.arange(24.0).reshape(6, 4)
    assert torch.equal(to_rows(to_blocks(r, 3)), r)
    assert torch.equal(to_blocks(r, 3)[1], r[1::3])
    assert to_blocks(r[:0], 3).shape == (3, 0, 4)


def test_rows_that_are_no_blocks() -> None:
    with pytest.raises(npl.ShapeError, match=r"groups must divide the rows of the outputs; got 3 groups for 4 rows"):
        npl.EmpiricalFisher("block").step(torch.ones(4, 2), None, npl.Tikhonov(0.1), groups=3)


def test_fisher_blocks_too_large() -> None:
    g = torch.zeros(1, 1).expand(6, 12000)
    with pytest.raises(npl.OutputsTooLargeError, match=r"'block', 3 blocks of 12000 features each, needs a C of 3.2"):
        npl.EmpiricalFisher("block").step(g, None, npl.Tikhonov(0.1), groups=3)


@pytest.mark.parametrize("structure", ["diagonal", "block"])
def test_training_with_them(structure: Any) -> None:
    """A few steps on sequences: the loss goes down, nothing falls back."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, V)).double(), torch.randn(N, T, 6, dtype=torch.float64)
    for curvature in ("fisher", "hessian"):
        options: Any = {"curvature": curvature, "structure": structure, "feature_dims": -1, "damping": 0.5}
        hook = npl.LossHook(**options, boundary="0", module=model)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = hook(cross_entropy(model(x)))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        assert hook.diagnostics()["fallbacks"] == 0


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({}, {"structure": "isotropic"}),
        ({"damping": npl.AutoDamping(ratio=1.0)}, {"structure": "isotropic", "damping": npl.AutoDamping(ratio=1.0)}),
        ({"damping": 0.1}, {"structure": "mean", "damping": 0.1}),
        ({"power": 0.5}, {"structure": "mean", "power": 0.5}),
        ({"curvature": "hessian"}, {"curvature": "hessian", "structure": "mean"}),
        ({"curvature": "auto"}, {"curvature": "fisher", "structure": "isotropic"}),
        ({"curvature": "auto", "damping": 0.1}, {"curvature": "fisher", "structure": "mean", "damping": 0.1}),
        ({"curvature": "auto", "power": 0.5}, {"curvature": "fisher", "structure": "mean", "power": 0.5}),
        ({"curvature": "auto", "structure": "diagonal"}, {"curvature": "fisher", "structure": "diagonal"}),
        ({"curvature": "auto", "structure": "gated"}, {"curvature": npl.GatedFisher()}),
        ({"curvature": npl.EmpiricalFisher()}, {"structure": "mean"}),
    ],
    ids=str,
)
def test_structure_auto_is_isotropic_for_fisher_with_a_relative_damping_only(
    options: dict[str, Any], same: dict[str, Any]
) -> None:
    generator = torch.Generator().manual_seed(0)
    hooks, steps = [npl.LossHook(**options), npl.LossHook(**same)], []
    for _ in range(2):  # the second step has a running mean behind it
        y = torch.randn(20, 4, generator=generator, dtype=torch.float64)
        t = torch.randint(4, (20,), generator=generator)
        for hook in hooks:
            leaf = y.clone().requires_grad_()
            hook(torch.nn.functional.cross_entropy(leaf, t)).backward()
            steps.append(leaf.grad)
        torch.testing.assert_close(steps[-1], steps[-2], rtol=0, atol=0)
