"""RankingLoss writes its gradient and Hessian down: they are those of autograd, and of 80 digits."""

from __future__ import annotations

import pytest
import torch
from tests.algorithms import jets
from tests.algorithms.test_ranking_loss import METHODS as LOSSES
from tests.algorithms.test_stability import CASES, METHODS
from torch import Tensor

import newton_plugin as npl
from newton_plugin._boundary.autograd_graph import known_hessian
from newton_plugin.algorithms import RankingLoss
from newton_plugin.algorithms._list_loss import chunks
from newton_plugin.algorithms._list_loss.function import plain_list_loss
from newton_plugin.algorithms._ranking.ranking_loss import _targets

every_method = pytest.mark.parametrize("method", [loss.method for loss, _ in LOSSES.values()], ids=LOSSES)


def _written(loss: RankingLoss, scores: Tensor, *args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient and Hessian as the loss itself gives them."""
    x = scores.clone().requires_grad_()
    value = loss(x, *args)
    known = known_hessian(value.grad_fn)
    assert known is not None
    (gradient,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), gradient, known[1]()


def _by_autograd(loss: RankingLoss, scores: Tensor, *args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same, by double backward through ordinary operations."""
    plain = lambda s: loss(s, *args).sum()  # noqa: E731
    hessian = torch.func.jacrev(torch.func.grad(plain))(scores)
    each = range(len(scores))
    return loss(scores, *args), torch.func.grad(plain)(scores), hessian[each, :, each]


def _close(got: Tensor, want: Tensor, rtol: float = 1e-10) -> None:
    """Relative to the largest entry of each list: a saturated list does not hide behind the others."""
    dims = tuple(range(1, want.ndim))
    scale = want.abs().amax(dims, keepdim=True) if dims else want.abs()
    assert got.isfinite().all()
    assert ((got - want).abs() <= rtol * scale + 1e-14 * want.abs().max()).all()


def _lists(n: int, scale: float) -> tuple[Tensor, Tensor]:
    """Seven lists: ordinary, a tie, all tied, the right order, the reversed one, tied ranks, all ranks tied."""
    generator = torch.Generator().manual_seed(n)
    scores = scale * torch.randn(7, n, generator=generator, dtype=torch.float64)
    ranks = torch.rand(7, n, generator=generator).argsort(-1)
    scores[1, 1] = scores[1, 0]
    scores[2] = scores[2, 0]
    ranks[3] = scores[3].argsort().argsort()
    ranks[4] = (-scores[4]).argsort().argsort()
    ranks[5, :2] = 0
    ranks[6] = 3
    return scores, ranks


@every_method
@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradient_and_hessian_are_those_of_double_backward(method, scale: float, reduction: str) -> None:
    loss = RankingLoss(method, reduction=reduction)
    for n in (2, 3, 6):
        scores, ranks = _lists(n, scale)
        # Gaussian: from distances of 10 on it is autograd that loses digits (see test_stability).
        rtol = 1e-7 if "gaussian" in repr(method) and scale > 1 else 1e-10
        for got, want in zip(_written(loss, scores, ranks), _by_autograd(loss, scores, ranks), strict=True):
            _close(got, want, rtol)


@every_method
def test_lists_of_different_length(method) -> None:
    loss = RankingLoss(method, reduction="none")
    scores, ranks = _lists(6, 1.0)
    mask = torch.rand(7, 6, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[0], mask[1], mask[2, :] = True, False, torch.arange(6) == 2
    got, want = (f(loss, scores, ranks, mask) for f in (_written, _by_autograd))
    for a, b in zip(got, want, strict=True):
        _close(a, b)
    assert torch.equal(got[2] != 0, (got[2] != 0) & mask.unsqueeze(-1) & mask.unsqueeze(-2))


@every_method
def test_the_hessian_is_symmetric_and_knows_no_shift(method) -> None:
    scores, ranks = _lists(6, 1.0)
    _, gradient, hessian = _written(RankingLoss(method), scores, ranks)
    assert torch.equal(hessian, hessian.mT)
    assert gradient.sum(-1).abs().max() < 1e-14 * max(1.0, float(gradient.abs().max()))
    assert hessian.sum(-1).abs().max() < 1e-12 * hessian.abs().max()


HARD = [
    *("reversed, 1e-6", "reversed, 1e0", "reversed, 1e1", "reversed, 1e6", "right order, 1e0", "right order, 1e1"),
    *("regular, 1e0", "regular, 1e2", "partly saturated", "deep, still representable", "mixed scales", "near-tie"),
    *("balanced large gaps", "tie", "triple tie", "all tied", "tie beside a saturated pair", "two"),
]


@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize("method", [m for m in METHODS if m != "bitonic reciprocal"])
def test_float32_agrees_with_80_digits(method: str, case: str) -> None:
    loss, twin = METHODS[method]
    scores, ranks = CASES[case]
    wanted = jets.bce(twin, scores, ranks)
    rtol = 1e-3 if "gaussian" in method and max(map(abs, scores)) >= 1e6 else 1e-4  # see test_stability
    got = _written(loss, torch.tensor([scores]), torch.tensor([ranks]))
    for what, a, b in zip(("loss", "gradient", "Hessian"), got, wanted, strict=True):
        flat = [b] if what == "loss" else b if what == "gradient" else [h for row in b for h in row]
        want = torch.tensor([float(x) for x in flat], dtype=torch.float64)
        error, scale = (a.double().flatten() - want).abs().max(), want.abs().max()
        assert a.isfinite().all()
        floor = 1e-15 if case == "all tied" else 1e-36  # of a network of tied wires, all is rounding
        assert error <= rtol * scale + floor, f"{what}: error {error:.3g} at scale {scale:.3g}"


@every_method
def test_the_newton_step_is_that_of_double_backward(method) -> None:
    loss = RankingLoss(method)
    scores, ranks = _lists(5, 1.0)

    def plain(y: Tensor) -> Tensor:
        return plain_list_loss(method, y, _targets(ranks), None).mean()

    for structure in ("mean", "per_sample"):
        curvature = npl.Hessian(structure=structure)
        a, b = (npl.newton_step(f, scores, curvature=curvature, damping=0.1) for f in (lambda y: loss(y, ranks), plain))
        torch.testing.assert_close(a.step, b.step, rtol=1e-8, atol=1e-12)


@every_method
def test_the_gradient_alone_is_kept(method) -> None:
    """Between forward and backward autograd keeps O(N n) of the loss's own making, beside scores and target."""
    scores, ranks = _lists(6, 1.0)
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        RankingLoss(method)(scores.requires_grad_(), ranks)
    assert sum(kept.values()) <= 7 * 6 * 6 + 4 * 7 * 6  # the target, and a few vectors


def test_where_there_is_no_hessian_to_know() -> None:
    scores, ranks = _lists(5, 1.0)
    loss = RankingLoss("neural_sort", temperature=1.0)
    x = scores.clone().requires_grad_()
    assert known_hessian(loss(x.unsqueeze(0), ranks.unsqueeze(0)).grad_fn) is None  # not lists (N, n)
    assert (
        known_hessian(RankingLoss(lambda s: torch.softmax(s[..., None] * s[..., None, :], -1))(x, ranks).grad_fn)
        is None
    )
    assert known_hessian(loss(x[:, :1], ranks[:, :1]).grad_fn) is None
    assert loss(scores, ranks).grad_fn is None
    with torch.no_grad():
        assert loss(x, ranks).grad_fn is None
    empty = loss.forward(x[:0], ranks[:0])
    assert empty.isnan()  # the mean over nothing, as ever


def test_derivatives_of_the_written_gradient() -> None:
    """create_graph goes to the ordinary operations, batched or not, and once more."""
    scores, ranks = _lists(4, 1.0)
    for loss, _ in LOSSES.values():
        x = scores.clone().requires_grad_()
        value = loss(x, ranks)
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        basis = torch.eye(4, dtype=x.dtype).unsqueeze(1).expand(-1, 7, -1)
        (columns,) = torch.autograd.grad(gradient, x, basis, is_grads_batched=True)
        _close(columns.movedim(0, 1), _written(loss, scores, ranks)[2], 1e-9)
        each = RankingLoss(loss.method, reduction="none")(x, ranks)
        (many,) = torch.autograd.grad(each, x, torch.eye(7, dtype=x.dtype), is_grads_batched=True)
        torch.testing.assert_close(many.sum(0) / 7, gradient.detach(), rtol=1e-10, atol=1e-13)


@every_method
def test_lists_worked_on_a_few_at_a_time(method, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = RankingLoss(method, reduction="none")
    scores, ranks = _lists(5, 1.0)
    mask = torch.rand(7, 5, generator=torch.Generator().manual_seed(0)) < 0.8
    together = _written(loss, scores, ranks, mask)
    for size in (1, 150, 500):
        monkeypatch.setattr(chunks, "_CHUNK", {"cpu": size})
        for got, want in zip(_written(loss, scores, ranks, mask), together, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)


@every_method
def test_asked_twice_it_says_the_same(method) -> None:
    """What is kept is not written to, whatever is worked on in place."""
    scores, ranks = _lists(5, 1.0)
    for some in (slice(None), slice(0, 1)):
        value = RankingLoss(method)(scores[some].requires_grad_(), ranks[some])
        known = known_hessian(value.grad_fn)
        assert known is not None
        assert torch.equal(known[1](), known[1]())
