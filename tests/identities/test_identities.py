"""What must hold for every curvature whatever the numbers: scale, sign, limits, batch size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.twins import relative_error
from torch import Tensor

import newton_plugin as npl

CURVATURES = st.sampled_from(["fisher", "hessian", "auto"])
STRUCTURES = st.sampled_from(["mean", "per_sample", "isotropic"])
DTYPES = st.sampled_from([torch.float32, torch.float64])
quick = settings(deadline=None, derandomize=True, max_examples=40)


def case(n: int, m: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y, t = torch.randn(2, n, m, generator=generator, dtype=torch.float64)
    return y.to(dtype), t.to(dtype)


def strictly_convex(y: Tensor, t: Tensor) -> Tensor:
    return (torch.cosh(y - t).sum(-1) + 0.1 * (y - t).sum(-1).square()).mean()


SHAPES = {"n": st.integers(1, 6), "m": st.integers(1, 5), "seed": st.integers(0, 1000)}


@quick
@given(**SHAPES, dtype=DTYPES)
def test_a_quadratic_is_solved_in_one_step(n: int, m: int, seed: int, dtype: torch.dtype) -> None:
    y, t = case(n, m, seed, dtype)
    a = torch.randn(m, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    a = (a @ a.T + torch.eye(m)).to(dtype)

    def quadratic(v: Tensor) -> Tensor:
        return 0.5 * ((v - t) @ a * (v - t)).sum(-1).mean()

    for structure in ("mean", "per_sample"):
        target = npl.newton_step(quadratic, y, curvature="hessian", structure=structure, damping=1e-12).target
        tolerance = 1e-9 if dtype == torch.float64 else 2e-3
        assert float((target - t).abs().max()) <= tolerance


@quick
@given(**SHAPES, curvature=CURVATURES, structure=STRUCTURES, power=st.sampled_from([1, 0.5]), dtype=DTYPES)
def test_infinite_damping_gives_the_gradient(
    n: int, m: int, seed: int, curvature: str, structure: str, power: float, dtype: torch.dtype
) -> None:
    y, t = case(n, m, seed, dtype)
    damping = 1e12
    taken = npl.newton_step(
        strictly_convex, y, t, curvature=curvature, structure=structure, power=power, damping=damping
    )
    assert relative_error(taken.step * damping**power, taken.gradient) <= (1e-8 if dtype == torch.float64 else 1e-5)


@quick
@given(**SHAPES, curvature=st.sampled_from(["fisher", "hessian", "norm"]), structure=STRUCTURES)
def test_a_duplicated_batch_takes_the_same_steps(n: int, m: int, seed: int, curvature: str, structure: str) -> None:
    y, t = case(n, m, seed)
    options = {"curvature": curvature, "structure": "mean" if curvature == "norm" else structure}
    for damping in (0.1, "auto"):
        once = npl.newton_step(strictly_convex, y, t, damping=damping, **options)
        twice = npl.newton_step(strictly_convex, y.repeat(2, 1), t.repeat(2, 1), damping=damping, **options)
        assert relative_error(twice.step[:n], once.step) <= 1e-10
        assert relative_error(twice.step[n:], once.step) <= 1e-10


@quick
@given(**SHAPES, structure=STRUCTURES, factor=st.sampled_from([1e-6, 0.37, 50.0, 1e6]))
def test_a_loss_times_c(n: int, m: int, seed: int, structure: str, factor: float) -> None:
    """Under damping "auto": the Hessian's step does not change; Fisher's is divided by c (C has c squared)."""
    y, t = case(n, m, seed)

    def scaled(v: Tensor, w: Tensor) -> Tensor:
        return factor * strictly_convex(v, w)

    for curvature, expected in (("hessian", 1.0), ("fisher", 1 / factor)):
        once = npl.newton_step(strictly_convex, y, t, curvature=curvature, structure=structure).step
        other = npl.newton_step(scaled, y, t, curvature=curvature, structure=structure).step
        assert relative_error(other, once * expected) <= 1e-8
    half = npl.newton_step(strictly_convex, y, t, structure=structure, power=0.5).step
    assert relative_error(npl.newton_step(scaled, y, t, structure=structure, power=0.5).step, half) <= 1e-8
    soft = npl.newton_step(strictly_convex, y, t, curvature="norm").step
    assert relative_error(npl.newton_step(scaled, y, t, curvature="norm").step, soft) <= 1e-8


@quick
@given(
    **SHAPES,
    rule=st.sampled_from([{"structure": "isotropic"}, {"curvature": "hessian"}]),
    unit=st.sampled_from([1e-4, 3.0, 1e4]),
)
def test_units_of_the_outputs(n: int, m: int, seed: int, rule: dict[str, Any], unit: float) -> None:
    """Outputs measured in another unit: the Hessian's step converts like the outputs, Fisher's the other way."""
    y, t = case(n, m, seed)

    def in_other_unit(v: Tensor, w: Tensor) -> Tensor:
        return strictly_convex(v / unit, w)

    once = npl.newton_step(strictly_convex, y, t, **rule).step
    other = npl.newton_step(in_other_unit, y * unit, t, **rule).step
    assert relative_error(other, once * unit) <= 1e-7


@quick
@given(**SHAPES, curvature=st.sampled_from(["fisher", "hessian"]), structure=STRUCTURES)
def test_sum_and_mean_are_the_same_step(n: int, m: int, seed: int, curvature: str, structure: str) -> None:
    y, t = case(n, m, seed)

    def summed(v: Tensor, w: Tensor) -> Tensor:
        return strictly_convex(v, w) * len(v)

    options = {"curvature": curvature, "structure": structure, "damping": 0.1}
    mean = npl.newton_step(strictly_convex, y, t, **options).step
    assert relative_error(npl.newton_step(summed, y, t, reduction="sum", **options).step, mean) <= 1e-10


@quick
@given(**SHAPES, structure=STRUCTURES, power=st.sampled_from([1, 0.5]), damping=st.sampled_from([1e-3, 0.3, "auto"]))
def test_every_step_goes_downhill_on_indefinite_losses(
    n: int, m: int, seed: int, structure: str, power: float, damping: float | str
) -> None:
    """The repair of indefinite Hessians: no sample's step points uphill."""
    y, _ = case(n, m, seed)

    def wavy(v: Tensor) -> Tensor:
        return (torch.sin(2 * v).sum(-1) + torch.cos(v.sum(-1) * 3)).mean()

    options = {"curvature": "hessian", "structure": structure, "power": power, "damping": damping}
    taken = npl.newton_step(wavy, y, **options)
    assert bool(((taken.step * taken.gradient).sum(-1) >= -1e-12).all())


@quick
@given(**SHAPES)
def test_soft_normalisation_is_the_fisher_family(n: int, m: int, seed: int) -> None:
    """ "norm" is the per-sample Fisher at power 1/2 with damping 0.1 mean |g|^2."""
    y, t = case(n, m, seed)
    soft = npl.newton_step(strictly_convex, y, t, curvature="norm")
    damping = float(0.1 * soft.gradient.square().sum(-1).mean())
    fisher = npl.newton_step(strictly_convex, y, t, structure="per_sample", power=0.5, damping=damping)
    assert relative_error(fisher.step, soft.step) <= 1e-12


@quick
@given(**SHAPES, shift=st.floats(0.01, 100.0))
def test_surrogate_gradient_is_the_step(n: int, m: int, seed: int, shift: float) -> None:
    y, t = case(n, m, seed)
    y.requires_grad_()
    step = (y - t).detach() * shift
    npl.quadratic_surrogate(y, y - step).backward()
    assert relative_error(y.grad, step / n) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_outputs_get_a_float64_solve(dtype: torch.dtype) -> None:
    """The step of half-precision outputs is the float64 step of the same numbers, rounded."""
    y, t = case(8, 4, 0, dtype)

    def loss(v: Tensor, w: Tensor) -> Tensor:
        return strictly_convex(v.float(), w.float())

    ours = npl.newton_step(loss, y, t, damping=1e-6).step
    assert ours.dtype == dtype
    theirs = npl.newton_step(strictly_convex, y.double(), t.double(), damping=1e-6).step
    assert (
        relative_error(ours.double(), theirs) <= {torch.float16: 2e-2, torch.bfloat16: 0.1, torch.float32: 1e-3}[dtype]
    )
