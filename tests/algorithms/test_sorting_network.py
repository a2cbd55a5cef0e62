"""SortingNetwork: it sorts, it is doubly stochastic, and it agrees with diffsort."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from newton_plugin import _errors as errors
from newton_plugin.algorithms import SortingNetwork
from newton_plugin.algorithms._sorting_network.layers import LAYOUTS, schedule
from newton_plugin.algorithms._sorting_network.swaps import SWAPS, log_swap, log_swap_slopes, swap, swap_slope

every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_swap = pytest.mark.parametrize("name", SWAPS)
quick = settings(deadline=None, derandomize=True, max_examples=30)


def _scores(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@every_layout
@pytest.mark.parametrize("n", range(1, 12))
def test_the_layers_sort_every_list_of_zeros_and_ones(layout: str, n: int) -> None:
    # A comparator network that sorts all lists of 0 and 1 sorts everything (Knuth, volume 3, 5.3.4).
    resting, layers = schedule(n, layout)
    lists = torch.tensor(list(product((0, 1), repeat=n)))
    wires = torch.nn.functional.pad(lists, (resting, 0))
    for layer in layers:
        for a, b, direction in layer.wires():
            pair = wires[:, [a, b]].sort(-1).values
            if direction:
                wires[:, [a, b][::direction]] = pair
    assert torch.equal(wires[:, resting:], lists.sort(-1).values)


@every_swap
@every_layout
def test_it_agrees_with_diffsort(layout: str, name: str) -> None:
    diffsort = pytest.importorskip("diffsort")
    for n in (2, 3, 5, 8, 10, 16, 66):
        scores = _scores(3, n)
        expected, p = diffsort.DiffSortNet(layout, n, steepness=5.0, distribution=name)(scores)
        values, ours = SortingNetwork(n, layout, name, 5.0)(scores)
        # diffsort adds 1e-10 to a denominator of the optimal swap.
        atol = 1e-9 if name == "optimal" else 1e-10
        torch.testing.assert_close(values, expected, rtol=0, atol=atol)
        torch.testing.assert_close(ours, p.transpose(-1, -2), rtol=0, atol=atol)


@every_layout
@pytest.mark.parametrize("n", [1, 2, 5, 8, 13, 64])
def test_ranks_rows_and_values_without_p(layout: str, n: int) -> None:
    scores = _scores(2, 3, n)
    network = SortingNetwork(n, layout, "cauchy", 3.0)
    values, p = network(scores)
    assert p.shape == (2, 3, n, n)
    torch.testing.assert_close((p @ scores.unsqueeze(-1)).squeeze(-1), values)
    torch.testing.assert_close(network.sort(scores), values)
    torch.testing.assert_close(network.ranks(scores), torch.arange(n).double() @ p)
    torch.testing.assert_close(network.rows(scores, max(1, n // 2)), p[..., : max(1, n // 2), :])


@every_layout
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 66), (5,), (1, 1, 66)])
def test_any_batch_shape(layout: str, shape: tuple[int, ...]) -> None:
    scores, n = _scores(*shape), shape[-1]
    network = SortingNetwork(n, layout)
    values, p = network(scores)
    assert values.shape == network.sort(scores).shape == network.ranks(scores).shape == shape
    assert p.shape == (*shape, n)
    assert p.is_contiguous()
    assert network.rows(scores, 2).shape == (*shape[:-1], 2, n)
    for log in network.log_probabilities(scores):
        assert log.shape == (*shape, n)


@quick
@given(
    st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=9),
    st.sampled_from(LAYOUTS),
    st.sampled_from(SWAPS),
    st.floats(0.1, 100),
)
def test_doubly_stochastic_and_a_shift_changes_nothing(values, layout, name, steepness) -> None:
    scores = torch.tensor(values, dtype=torch.float64)
    network = SortingNetwork(len(values), layout, name, steepness)
    _, p = network(scores)
    one = torch.ones_like(scores)
    assert (p >= 0).all()
    torch.testing.assert_close(p.sum(-1), one)
    torch.testing.assert_close(p.sum(-2), one)
    torch.testing.assert_close(network(scores + 1024.0)[1], p, rtol=1e-5, atol=1e-7)


@every_swap
@every_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_towards_infinite_steepness_it_is_torch_sort(layout: str, name: str, dtype: torch.dtype) -> None:
    for n in (7, 64):
        scores = torch.randperm(n, generator=torch.Generator().manual_seed(n)).to(dtype) + 1
        network = SortingNetwork(n, layout, name, 1e300 if dtype == torch.float64 else 1e30)
        values, p = network(scores)
        assert torch.equal(values, scores.sort().values)
        assert torch.equal(network.sort(scores), scores.sort().values)
        # Heavy tails reach 0 as 1 / steepness; the others underflow to it.
        far = 0.0 if name in ("logistic", "gaussian") else 1e-28
        assert torch.allclose(p, torch.eye(n, dtype=dtype)[scores.argsort()], rtol=0, atol=far)


@every_swap
def test_swaps_are_distribution_functions_and_their_logarithms_are_right(name: str) -> None:
    x = torch.linspace(-30, 30, 241, dtype=torch.float64)
    f = swap(name, x)
    torch.testing.assert_close(f + swap(name, -x), torch.ones_like(x), rtol=0, atol=1e-15)
    assert (f.diff() >= 0).all()
    log_f, log_rest = log_swap(name, x)
    right = x > -5  # further left, f itself has lost digits for some swaps
    torch.testing.assert_close(log_f[right], f.log()[right], rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(log_rest, log_swap(name, -x)[0], rtol=1e-14, atol=0)
    x.requires_grad_()
    slope = torch.autograd.grad(log_swap(name, x)[0].sum(), x)[0]
    step = 1e-6
    numeric = (log_swap(name, x + step)[0] - log_swap(name, x - step)[0]).detach() / (2 * step)
    torch.testing.assert_close(slope, numeric, rtol=1e-5, atol=1e-7)


@every_swap
def test_the_slopes_written_down_are_those_of_autograd(name: str) -> None:
    x = torch.cat((torch.linspace(-60, 60, 241).double(), torch.tensor([-1e7, -41.0, -0.25, 0.25, 1e7]).double()))
    x.requires_grad_()
    (slope,) = torch.autograd.grad(swap(name, x).sum(), x)
    torch.testing.assert_close(swap_slope(name, x), slope, rtol=1e-9, atol=1e-15)
    logs = log_swap(name, x)
    written = log_swap_slopes(name, x.detach(), *(log.detach() for log in logs))
    for log, first, second in zip(logs, written[::2], written[1::2], strict=True):
        (slope,) = torch.autograd.grad(log.sum(), x, create_graph=True)
        torch.testing.assert_close(first, slope.detach(), rtol=1e-9, atol=1e-14)
        (bend,) = torch.autograd.grad(slope.sum(), x, retain_graph=True)
        torch.testing.assert_close(second, bend, rtol=1e-7, atol=1e-12)


def test_half_precision_and_autocast() -> None:
    scores = _scores(3, 70, dtype=torch.float32)
    network = SortingNetwork(70, steepness=5.0)
    values, p = network(scores)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, _ = network(scores)
    assert torch.equal(inside, values)
    assert network(scores.bfloat16())[1].dtype == torch.bfloat16
    assert p.dtype == torch.float32


def test_vmap_jvp_and_second_derivatives() -> None:
    scores = _scores(3, 5)
    for layout in LAYOUTS:
        network = SortingNetwork(5, layout, "logistic", 2.0)
        values, p = torch.func.vmap(network)(scores)
        torch.testing.assert_close(values, network(scores)[0])
        torch.testing.assert_close(p, network(scores)[1])
        x = scores[0].clone().requires_grad_()
        for f in (network.sort, network.ranks, lambda s, f=network: f.rows(s, 2), network):
            assert torch.autograd.gradcheck(f, x, check_forward_ad=True)
            assert torch.autograd.gradgradcheck(f, x)


def test_what_it_refuses() -> None:
    with pytest.raises(errors.ArgumentTypeError, match=r"n must be the length of the lists, an int; got 4\.0"):
        SortingNetwork(4.0)  # type: ignore[arg-type]
    with pytest.raises(errors.ArgumentError, match=r"n must be at least 1; got 0"):
        SortingNetwork(0)
    with pytest.raises(errors.ArgumentError, match=r"layout must be one of 'odd_even', 'bitonic'; got 'shell'"):
        SortingNetwork(4, "shell")
    with pytest.raises(errors.ArgumentError, match=r"swap must be one of 'logistic'.*got 'tanh'"):
        SortingNetwork(4, swap="tanh")
    with pytest.raises(errors.ArgumentError, match=r"steepness must be positive and finite; got -1.*Larger is"):
        SortingNetwork(4, steepness=-1)
    with pytest.raises(errors.ShapeError, match=r"4 elements in the last dimension.*got \(2, 5\).*SortingNetwork\(5\)"):
        SortingNetwork(4)(torch.zeros(2, 5))
    with pytest.raises(errors.ArgumentTypeError, match=r"scores must have a floating-point dtype"):
        SortingNetwork(4)(torch.zeros(4, dtype=torch.long))
