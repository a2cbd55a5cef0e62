"""float32 against 80 digits: loss, gradient and Hessian of every method, from near-ties to saturated wrong
orders."""

from __future__ import annotations

import pytest
import torch
from tests.algorithms import jets

from newton_plugin.algorithms import RankingLoss, neural_sort

# name -> (RankingLoss of the method, its twin)
METHODS = {
    "neural_sort": (RankingLoss("neural_sort", temperature=0.1), jets.neural_sort(0.1)),
    "soft_sort": (RankingLoss("soft_sort", temperature=0.1), jets.soft_sort(0.1, 1)),
    "soft_sort, p=2": (RankingLoss("soft_sort", temperature=0.1, p=2), jets.soft_sort(0.1, 2)),
    **{
        f"{layout} {swap}": (
            RankingLoss("sorting_network", layout=layout, swap=swap, steepness=10.0),
            jets.sorting_network(layout, swap, 10.0),
        )
        for layout in ("odd_even", "bitonic")
        for swap in jets.SWAPS
    },
}


def _float32(values) -> list[float]:
    return torch.tensor(values, dtype=torch.float32).tolist()


def _cases() -> dict[str, tuple[list[float], list[int]]]:
    generator = torch.Generator().manual_seed(0)
    cases = {}
    for power in range(-6, 7):
        scores = (torch.rand(4, generator=generator, dtype=torch.float64) * 10.0**power).tolist()
        order = torch.tensor(scores).argsort().argsort()
        cases[f"right order, 1e{power}"] = (scores, order.tolist())
        cases[f"reversed, 1e{power}"] = (scores, (3 - order).tolist())
        cases[f"regular, 1e{power}"] = ([10.0**power * k for k in (2, 0, 1, 3)], [1, 3, 0, 2])
    cases["partly saturated"] = ([0.0, 0.7, 2.9, 4.0], [3, 2, 1, 0])
    cases["deep, still representable"] = ([0.0, 3.1, 5.2, 8.0], [0, 1, 2, 3])
    cases["mixed scales"] = ([1e6, 0.1, 0.0, 1e6 + 0.125, -1e4], [0, 3, 4, 1, 2])
    cases["balanced large gaps"] = ([0.1234, 1e6, 2e6], [2, 0, 1])
    cases["near-tie"] = ([0.3, 0.3 + 1e-7, -0.2, 0.1], [0, 1, 3, 2])
    cases["near-tie at zero"] = ([0.0, 1e-7, 1e4], [2, 1, 0])
    cases["offset"] = ([1e6, 1e6 + 0.0625, 1e6 - 0.125], [2, 0, 1])
    cases["tie"] = ([0.5, 0.5, 0.0, 0.6], [3, 1, 0, 2])
    cases["triple tie"] = ([0.5, 0.0, 0.5, 0.5], [0, 1, 2, 3])
    cases["all tied"] = ([2.0, 2.0, 2.0, 2.0], [2, 0, 3, 1])
    cases["tie beside a saturated pair"] = ([1e6, 1e6, -1e6], [0, 1, 2])
    cases["two"] = ([5.0, 0.0], [0, 1])
    return {name: (_float32(scores), ranks) for name, (scores, ranks) in cases.items()}


CASES = _cases()


def _close(got: torch.Tensor, want: list, what: str, rtol: float = 1e-4) -> None:
    want = torch.tensor([float(w) for w in want], dtype=torch.float64)
    got = got.double().flatten()
    assert got.isfinite().all(), what
    error, scale = (got - want).abs().max().item(), want.abs().max().item()
    # 1e-36: below it float32 has no full precision
    assert error <= rtol * scale + 1e-36, f"{what}: error {error:.3g} at scale {scale:.3g}"


# Every decade for one method of each family, every second one for its relatives.
PAIRS = [
    (method, case)
    for method in METHODS
    for case in CASES
    if method in ("neural_sort", "soft_sort", "odd_even logistic")
    or not case.endswith(("1e-5", "1e-4", "1e-3", "1e-1", "1e1", "1e3", "1e5"))
]


@pytest.mark.parametrize(("method", "case"), PAIRS)
def test_float32_agrees_with_80_digits(method: str, case: str) -> None:
    loss, twin = METHODS[method]
    scores, ranks = CASES[case]
    value, gradient, hessian = jets.bce(twin, scores, ranks)
    x, r = torch.tensor(scores), torch.tensor(ranks)
    assert x.dtype == torch.float32
    # The Gaussian's logarithms are squares: (10 * 1e6)^2/2 is more than float64 can tell from its neighbours.
    rtol = 1e-3 if "gaussian" in method and max(map(abs, scores)) >= 1e6 else 1e-4
    _close(loss(x, r), [value], "loss")
    _close(torch.func.grad(loss)(x, r), gradient, "gradient", rtol)
    _close(torch.func.hessian(loss)(x, r), [h for row in hessian for h in row], "Hessian", rtol)


@pytest.mark.parametrize("method", METHODS)
def test_the_largest_float32_scores_have_finite_gradients(method: str) -> None:
    loss, _ = METHODS[method]
    # Where the loss grows with the square of the distance, the true gradient of 1e38 is not a float32 number.
    size = 1e30 if method.endswith(("p=2", "gaussian")) else 1e38
    x = size * torch.tensor([[3, -3, 0.0, 1e-38], [1, 2, 3, 3]])
    r = torch.tensor([[3, 0, 2, 1], [3, 2, 0, 1]])
    assert torch.func.grad(loss)(x, r).isfinite().all()
    assert torch.func.hessian(loss)(x[0], r[0]).isfinite().all()


def test_the_textbook_loss_explodes_where_ours_does_not() -> None:
    """Kept as a record of what the log domain is for: BCE of the float32 P, on saturated wrong orders."""
    ours, _ = METHODS["neural_sort"]
    textbook = RankingLoss(lambda s: neural_sort(s, temperature=0.1))
    x = 2 * torch.randn(5, generator=torch.Generator().manual_seed(0))
    r = (-x).argsort().argsort()
    assert torch.func.grad(textbook)(x, r).abs().max() > 1e3
    assert torch.func.hessian(textbook)(x, r).abs().max() > 1e6
    assert torch.func.grad(ours)(x, r).abs().max() < 5
    assert torch.func.hessian(ours)(x, r).abs().max() < 5
