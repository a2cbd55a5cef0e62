"""Rows that are taken in parts: the same steps as all at once, in the outputs' dtype, from sums in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests import twins
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import newton_plugin as npl
from newton_plugin._linalg import large_rows

KINDS: dict[str, dict[str, Any]] = {
    "norm": {"curvature": "norm"},
    "mean": {"damping": 0.1},
    "mean, power 1/2": {"damping": 0.1, "power": 0.5},
    "mean, auto": {},
    "mean, kept": {"curvature": npl.EmpiricalFisher(refresh_every=2), "damping": 0.1},
    "per sample": {"structure": "per_sample", "damping": 0.1},
    "isotropic, auto": {"structure": "isotropic"},
    "diagonal": {"structure": "diagonal"},
    "block": {"structure": "block", "feature_dims": -1},
}


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch is large, and a part holds a few rows, or columns, of it."""
    monkeypatch.setattr(large_rows, "_LARGE", 1)
    monkeypatch.setattr(large_rows, "_PART_ELEMENTS", 700)


def sent(options: dict[str, Any], dtype: torch.dtype, shape: tuple[int, ...], scale: float = 1.0) -> list[Tensor]:
    """What three steps send to the outputs."""
    g = torch.Generator().manual_seed(0)
    hook, found = npl.LossHook(**options), []
    for _ in range(3):
        y = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
        t = torch.randint(shape[-1], shape[:-1], generator=g)
        (hook(F.cross_entropy((2 * y).movedim(-1, 1), t)) * scale).backward()
        assert y.grad is not None
        found.append(y.grad)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(40, 3), (7, 300), (40, 300)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_parts_give_the_step_of_the_whole(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (shape[0], 4, shape[1]) if kind == "block" else shape
    whole = sent(KINDS[kind], torch.float64, shape)
    monkeypatch.setattr(large_rows, "_LARGE", 1)
    monkeypatch.setattr(large_rows, "_PART_ELEMENTS", 700)
    for ours, theirs in zip(sent(KINDS[kind], dtype, shape), whole, strict=True):
        assert ours.dtype == dtype
        error = float((ours - theirs).norm() / theirs.norm())
        assert error <= (1e-12 if dtype == torch.float64 else 2e-6)  # the gradients themselves are rounded


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("scale", [3.0, 2.0**20])
@pytest.mark.parametrize("kind", KINDS)
def test_scaling_the_loss_scales_what_is_sent(kind: str, scale: float) -> None:
    shape = (12, 4, 30) if kind == "block" else (12, 300)
    for ours, theirs in zip(
        sent(KINDS[kind], torch.float32, shape, scale), sent(KINDS[kind], torch.float32, shape), strict=True
    ):
        torch.testing.assert_close(ours / scale, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))


@pytest.mark.usefixtures("parts")
def test_diagnostics_are_those_of_the_rows() -> None:
    for kind, options in KINDS.items():
        hook = npl.LossHook(**options)
        y = torch.randn(6, 2, 50, generator=torch.Generator().manual_seed(1)).requires_grad_()
        rows = 12 if kind == "block" else 6
        loss = hook((y.cosh().flatten(1).sum(-1)).mean() if kind != "block" else y.cosh().sum(-1).mean())
        (8 * loss).backward()
        assert y.grad is not None
        said = hook.diagnostics()
        assert said["step_norm"] == pytest.approx(float((y.grad * rows / 8).square().sum() / rows) ** 0.5, rel=1e-4)
        assert said["gradient_norm"] == pytest.approx(float(y.detach().sinh().square().sum() / rows) ** 0.5, rel=1e-4)


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_is_not_finite_stays_as_it_is(kind: str) -> None:
    hook = npl.LossHook(**KINDS[kind])
    for bad in (float("nan"), float("inf")):
        y = torch.randn(6, 2, 50).requires_grad_()
        weights = torch.ones_like(y)
        weights[2, 1, 7] = bad
        hook((y * weights).sum((-1,) if kind == "block" else (-2, -1)).mean()).backward()
        assert y.grad is not None
        torch.testing.assert_close(y.grad, weights / (12 if kind == "block" else 6), equal_nan=True)
    assert hook.diagnostics()["fallbacks"] == 2


@pytest.mark.parametrize("shift", [0.0, 1.0, 10.0, 100.0])
def test_float32_products_are_used_only_where_nothing_cancels(shift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The more alike the gradients, the more a step takes away from them; the error stays below 1e-6."""
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 4000, generator=g) + shift * torch.randn(4000, generator=g)
    exact = rows.double()
    for damping in (1.0, 1e-3 * float(exact.square().sum(-1).mean()) / 60):
        theirs = twins_push_through(exact, damping)
        monkeypatch.setattr(large_rows, "_LARGE", 1)
        ours = npl.EmpiricalFisher().step(rows, None, npl.Tikhonov(damping)).step
        monkeypatch.undo()
        assert ours.dtype == torch.float32
        error = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)
        assert float(error.max()) <= 1e-6


def twins_push_through(rows: Tensor, damping: float) -> Tensor:
    """By the singular values, which no matrix product has squared."""
    u, s, v = torch.linalg.svd(rows, full_matrices=False)
    return u @ torch.diag(s / (s**2 / len(rows) + damping)) @ v


def test_a_gram_matrix_in_parts_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_rows, "_LARGE", 1)
    monkeypatch.setattr(large_rows, "_PART_ELEMENTS", 1000)
    for n in (1, 7, 33, 90):
        rows = torch.randn(n, 211, dtype=torch.float64)
        ours = large_rows.gram(rows)
        assert twins.relative_error(ours, rows @ rows.mT) <= 1e-14


class Largest(TorchDispatchMode):
    """The bytes of every tensor that is made under it, where they are as many as those of the rows in float64."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.doubles = elements, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float64 and result.numel() >= self.elements:
            self.doubles += 1
        return result


@pytest.mark.parametrize("kind", ["norm", "mean", "mean, auto", "per sample", "isotropic, auto", "diagonal"])
def test_large_outputs_are_never_copied_to_float64(kind: str) -> None:
    y = torch.randn(64, 10_000, requires_grad=True)
    hook = npl.LossHook(**KINDS[kind])
    loss = hook(F.cross_entropy(y, torch.arange(64)))
    with Largest(y.numel() // 2) as largest:
        loss.backward()
    assert largest.doubles == 0


class OwnSteps(npl.EmpiricalFisher):
    """As a user writes one: it looks at the size of the gradients, and knows no weights."""

    def step(self, gradient: Tensor, hvp: Any, damping: npl.Damping) -> Any:  # type: ignore[override]
        return super().step(gradient.clamp(-0.5, 0.5), hvp, damping)


@pytest.mark.usefixtures("parts")
def test_a_subclass_with_a_step_of_its_own_gets_the_gradients_of_the_samples() -> None:
    steps = sent({"curvature": OwnSteps(), "damping": 0.1}, torch.float32, (12, 30), scale=8.0)
    once = sent({"curvature": OwnSteps(), "damping": 0.1}, torch.float32, (12, 30))
    for ours, theirs in zip(steps, once, strict=True):
        torch.testing.assert_close(ours / 8, theirs, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_nonzero_in_large_rows(dtype: torch.dtype, parts: None) -> None:
    """The least number of the format, NaN and infinity are; a negative zero is not."""
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    rows = torch.zeros(8, 300, dtype=dtype)
    rows[1:7, 250] = torch.tensor([least, -least, torch.nan, torch.inf, -torch.inf, -0.0], dtype=dtype)
    assert large_rows.nonzero_rows(rows).tolist() == [False, True, True, True, True, True, False, False]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_wider_than_a_part(dtype: torch.dtype, parts: None) -> None:
    """They are taken in pieces of columns, and never copied whole."""
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 1999, generator=g).to(dtype) for _ in range(2))
    by, factor = torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    torch.testing.assert_close(large_rows.squared_norms(a), a.double().square().sum(-1), rtol=1e-14, atol=0)
    torch.testing.assert_close(large_rows.inner_products(a, b), (a.double() * b.double()).sum(-1), rtol=1e-13, atol=0)
    whole = (a.double() / (by / factor).unsqueeze(-1)).to(dtype)
    assert torch.equal(large_rows.divide(a, by, factor), whole)
    assert torch.equal(large_rows.divide(a, by[0]), (a.double() / 2).to(dtype))
