"""Gradients at the weights of the last layer, against each sample's own gradient, formed number by number."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from newton_plugin._curvature import head_sums as module
from newton_plugin._curvature.head_sums import HeadRows, head_size, head_sums

G = torch.Generator().manual_seed(0)
N = 7
GROUPS = torch.stack([torch.arange(N) % 3 == 0, torch.arange(N) % 3 != 0])


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=G, dtype=torch.float64)


def dense(head: HeadRows, groups: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Sums of ``scale v_i`` and of their squares, sample by sample, in float64."""
    a, b = head.gradients.double(), head.inputs.double()
    sums = torch.zeros(len(groups), a.shape[-1] * b.shape[-1], dtype=torch.float64)
    squares = torch.zeros_like(sums)
    for i in range(len(a)):
        v = scale * sum(torch.outer(a[i, p], b[i, p]) for p in range(a.shape[1])).flatten()  # type: ignore[union-attr]
        for k in range(len(groups)):
            sums[k] += groups[k, i] * v
            squares[k] += groups[k, i] * v.square()
    return sums, squares


@pytest.mark.parametrize("positions", [1, 5])
@pytest.mark.parametrize("k", [1, 4])
def test_sums_are_those_of_each_samples_gradient(positions: int, k: int) -> None:
    head = HeadRows(randn(N, positions, k), randn(N, positions, 3))
    found = head_sums(head, GROUPS, torch.tensor(1.7, dtype=torch.float64))
    sums, squares = dense(head, GROUPS, 1.7)
    torch.testing.assert_close(found.sums, sums, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found.squares, squares, rtol=1e-13, atol=1e-13)
    assert found.sums.shape[1] == head_size(head)


def test_groups_may_weigh_samples() -> None:
    head, groups = HeadRows(randn(N, 2, 3), randn(N, 2, 4)), torch.rand(3, N, generator=G, dtype=torch.float64)
    found = head_sums(head, groups, torch.ones((), dtype=torch.float64))
    sums, squares = dense(head, groups, 1.0)
    torch.testing.assert_close(found.sums, sums, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found.squares, squares, rtol=1e-13, atol=1e-13)


def test_a_convolution_is_a_layer_at_many_positions() -> None:
    """Patches as inputs, pixels as positions: the gradients that autograd finds for each sample's kernel."""
    x, weight, target = randn(N, 2, 6, 6), randn(3, 2, 3, 3).requires_grad_(), randn(N, 3, 4, 4)
    own = []
    for i in range(N):
        loss = (F.conv2d(x[i : i + 1], weight) - target[i : i + 1]).square().sum()
        own.append(torch.autograd.grad(loss, weight)[0].flatten())
    at_outputs = 2 * (F.conv2d(x, weight.detach()) - target)
    head = HeadRows(at_outputs.flatten(2).mT, F.unfold(x, 3).mT)
    found = head_sums(head, GROUPS, torch.ones((), dtype=torch.float64))
    v = torch.stack(own)
    torch.testing.assert_close(found.sums, GROUPS.double() @ v, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(found.squares, GROUPS.double() @ v.square(), rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e3])
def test_half_precision_is_rounded_once_and_never_overflows(dtype: torch.dtype, unit: float) -> None:
    """The scale alone may be far outside of the range of half precision."""
    head = HeadRows((unit * randn(N, 1, 4)).to(dtype), randn(N, 1, 3).to(dtype))
    scale = float(1e-2 / unit**2)
    found = head_sums(head, GROUPS, torch.tensor(scale, dtype=torch.float64))
    assert found.sums.dtype == torch.float32
    sums, squares = dense(head, GROUPS, scale)
    torch.testing.assert_close(found.sums.double(), sums, rtol=1e-5, atol=1e-6 * float(sums.abs().max()))
    torch.testing.assert_close(found.squares.double(), squares, rtol=1e-5, atol=1e-6 * float(squares.max()))


def test_gradients_in_float64_above_inputs_in_float32_are_scaled_before_they_are_rounded() -> None:
    """Gradients below the range of float32 are of the usual size once they are scaled."""
    head = HeadRows(1e-60 * randn(N, 1, 4), randn(N, 1, 3).float())
    found = head_sums(head, GROUPS, torch.tensor(1e60, dtype=torch.float64))
    sums, _ = dense(head, GROUPS, 1e60)
    torch.testing.assert_close(found.sums.double(), sums, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("k", "d"), [(50, 10), (3, 500), (100, 500), (7, 5), (101, 1), (64, 64)])
def test_sketches_have_the_size_that_is_told(monkeypatch: pytest.MonkeyPatch, k: int, d: int) -> None:
    monkeypatch.setattr(module, "_MOST", 256)
    monkeypatch.setattr(module, "_MOST_INPUTS", 32)
    head = HeadRows(randn(N, 2, k), randn(N, 2, d))
    size = head_sums(head, GROUPS, torch.ones(())).sums.shape[1]
    assert size == head_size(head) <= 256
    assert size > min(k * d, 256) / 4  # and does not throw away more than it has to


def test_inner_products_of_sketches_are_right_on_average(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against those of the sums themselves, relative to their lengths: the mean over many pairs, and each one."""
    monkeypatch.setattr(module, "_MOST", 512)
    monkeypatch.setattr(module, "_MOST_INPUTS", 64)
    pairs, k, d = 600, 40, 150
    shared = randn(pairs, k), randn(pairs, d)
    a = torch.stack([shared[0] + randn(pairs, k), shared[0] + randn(pairs, k)], 1)
    b = torch.stack([shared[1] + randn(pairs, d), shared[1] + randn(pairs, d)], 1)
    true = (a[:, 0] * a[:, 1]).sum(-1) * (b[:, 0] * b[:, 1]).sum(-1)
    lengths = (a.norm(dim=-1) * b.norm(dim=-1)).prod(-1)
    each = torch.eye(2 * pairs, dtype=torch.float64)
    sums = head_sums(HeadRows(a.reshape(-1, 1, k), b.reshape(-1, 1, d)), each, torch.ones(())).sums
    sums = sums.reshape(pairs, 2, -1)
    error = ((sums[:, 0] * sums[:, 1]).sum(-1) - true) / lengths
    assert float(true.div(lengths).mean()) > 0.2  # there is something to find
    assert abs(float(error.mean())) < 4 * float(error.std()) / pairs**0.5
    assert float(error.std()) < 2 / 512**0.5 + 0.15  # two sketches of 8 and 64 numbers in a row
    own = sums.square().sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)).square()
    assert abs(float(own.mean()) - 1) < 0.03


def test_signs_are_the_same_at_every_call_and_even() -> None:
    for size in (4097, 50_000, 128_256):
        signs = module._drawn(size, torch.float64, torch.device("cpu"))
        assert torch.equal(signs, module._signs(size, torch.float64, torch.device("cpu")))
        assert set(signs.unique().tolist()) == {-1.0, 1.0}
        assert abs(float(signs.mean())) < 5 / size**0.5
        # Numbers that are added up are `lag` apart: their signs must be unrelated.
        for lag in (1, 21, 256, 2049):
            assert abs(float((signs[lag:] * signs[:-lag]).mean())) < 6 / (size - lag) ** 0.5


def test_calls_of_one_layer_are_one_batch() -> None:
    head = HeadRows(randn(N, 2, 3), randn(N, 2, 4))
    parts = [HeadRows(head.gradients[s], head.inputs[s]) for s in (slice(0, 3), slice(3, 3), slice(3, N))]
    joined = HeadRows.joined(parts)
    assert joined is not None
    assert torch.equal(joined.gradients, head.gradients)
    assert torch.equal(joined.inputs, head.inputs)


def test_an_empty_call_does_not_count_and_other_positions_are_not_joined() -> None:
    head, empty = HeadRows(randn(N, 5, 3), randn(N, 5, 4)), HeadRows(randn(0, 1, 3), randn(0, 1, 4))
    for parts in ([empty, head], [head, empty]):
        joined = HeadRows.joined(parts)
        assert joined is not None
        assert len(joined) == N
    assert HeadRows.joined([empty, empty]) is empty
    assert HeadRows.joined([head, HeadRows(randn(2, 1, 3), randn(2, 1, 4))]) is None
