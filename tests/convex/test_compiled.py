"""The compiled path of solve_qp: the torch path's answers, statuses and derivatives, and the bits of being alone."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.convex.problems import known_qp
from torch import Tensor
from torch.func import jacrev, vmap

from newton_plugin.convex import MissingSolverError, NonUniqueSolutionWarning, Status, solve_qp
from newton_plugin.convex._solvers import choose

pytest.importorskip("numba")

SIZES = [(1, 0, 0), (1, 0, 1), (3, 1, 0), (6, 1, 8), (20, 0, 7), (9, 2, 13), (13, 3, 29), (50, 10, 50), (101, 20, 103)]


def given_data(size: tuple[int, int, int], batch: int | None, shared: bool = False, **options: float) -> list[Tensor]:
    """Six tensors; absent rows as none at all."""
    known = known_qp(*size, batch=batch, shared=shared, **{"active": 0.4, "condition": 100.0, "seed": 1, **options})
    n, lead = size[0], () if batch is None else (batch,)
    empty = [torch.zeros(*(() if shared else lead), 0, n), torch.zeros(*lead, 0)] * 3
    return [e.double() if t is None else t for t, e in zip(known.data, empty, strict=True)]


def all_gradients(data: list[Tensor], solver: str, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """x, nu, lam, and the six gradients of a random linear function of them."""
    leaves = [t.detach().clone().requires_grad_() for t in data]
    solution = solve_qp(*leaves, solver=solver)
    assert solution.solver == ("numba" if solver == "auto" else solver)
    g = torch.Generator().manual_seed(seed)
    parts = [solution.x, solution.nu, solution.lam]
    weights = [torch.randn(t.shape, generator=g, dtype=torch.float64) for t in parts]
    return [t.detach() for t in parts], list(torch.autograd.grad(parts, leaves, weights, materialize_grads=True))


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool((a - b).norm() <= tolerance * b.norm().clamp(min=1e-3))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("batch", "shared"), [(None, False), (1, True), (5, False), (5, True)])
def test_the_answers_of_the_torch_path(size: tuple[int, int, int], batch: int | None, shared: bool) -> None:
    data = given_data(size, batch, shared)
    (ours, our_gradients), (theirs, their_gradients) = all_gradients(data, "auto"), all_gradients(data, "torch")
    for a, b in zip(ours, theirs, strict=True):
        assert close(a, b, 1e-10)
    for a, b in zip(our_gradients, their_gradients, strict=True):
        assert a.shape == b.shape
        assert close(a, b, 1e-10)


@pytest.mark.parametrize("batched", ["Q", "p", "A", "b", "G", "h", "pbh", "QG", "Ap", "Gb"])
def test_any_argument_may_be_shared(batched: str) -> None:
    """Those named have the batch dimension, the others do not; gradients of the others are sums."""
    g = torch.Generator().manual_seed(0)
    data = given_data((6, 1, 8), None)
    data = [
        t * (1 + 0.01 * torch.rand(4, *(1,) * t.ndim, generator=g, dtype=torch.float64)) if name in batched else t
        for name, t in zip("QpAbGh", data, strict=True)
    ]
    (ours, our_gradients), (theirs, their_gradients) = all_gradients(data, "auto"), all_gradients(data, "torch")
    for a, b in zip(ours + our_gradients, theirs + their_gradients, strict=True):
        assert a.shape == b.shape
        assert close(a, b, 1e-10)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shared", [False, True])
def test_the_bits_of_being_alone(size: tuple[int, int, int], shared: bool) -> None:
    """In a batch, as a batch of one, without a batch, and with copies of shared matrices: values and gradients."""
    batch = 11
    data = given_data(size, batch, shared)
    own = [t if not shared or i % 2 else t.expand(batch, *t.shape).clone() for i, t in enumerate(data)]
    g = torch.Generator().manual_seed(2)
    weight = torch.randn(batch, size[0], generator=g, dtype=torch.float64)

    def solve(data: list[Tensor], weight: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        leaves = [t.detach().clone().requires_grad_() for t in data]
        solution = solve_qp(*leaves, solver="numba")
        return [solution.x, solution.nu, solution.lam], list(
            torch.autograd.grad(solution.x, leaves, weight, materialize_grads=True)
        )

    together, _ = solve(data, weight)
    copies, gradients = solve(own, weight)
    assert all(torch.equal(a, b) for a, b in zip(together, copies, strict=True))
    for i in (0, 3, 10):
        for kept in (slice(i, i + 1), i):
            values, alone = solve([t[kept] for t in own], weight[kept])
            assert all(torch.equal(a, b[kept]) for a, b in zip(values, copies, strict=True))
            assert all(torch.equal(a, b[kept]) for a, b in zip(alone, gradients, strict=True))


def broken() -> list[Tensor]:
    """Eight problems: 1 non-convex, 2 with duplicate rows, 3 infeasible, 5 with a NaN, 6 without Q; odd n."""
    Q, p, A, b, G, h = (t.clone() for t in given_data((7, 1, 9), 8))
    Q[1] = -Q[1]
    G[2, :2], h[2, :2] = G[2, 2], h[2, 2]
    G[3, 1], h[3, :2] = -G[3, 0], -50.0
    p[5] = torch.nan
    Q[6], G[6, :7], h[6, :7] = 0.0, torch.eye(7, dtype=torch.float64) * p[6].sign().neg().unsqueeze(-1), 1.0
    return [Q, p, A, b, G, h]


@pytest.fixture
def _quiet() -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NonUniqueSolutionWarning)
        yield


@pytest.mark.usefixtures("_quiet")
def test_what_is_not_certified_goes_the_general_way() -> None:
    data = [t.requires_grad_() for t in broken()]
    ours, theirs = (solve_qp(*data, solver=solver, on_failure="nan") for solver in ("numba", "torch"))
    assert (ours.solver, theirs.solver) == ("numba", "torch")
    assert torch.equal(ours.status, theirs.status)
    assert ours.status[[1, 3, 5]].tolist() == [Status.NON_CONVEX, Status.INFEASIBLE, Status.NOT_FINITE]
    good = (ours.status == 0).nonzero().squeeze(-1)
    assert good.tolist() == [0, 2, 4, 6, 7]
    assert torch.equal(ours.active, theirs.active)
    assert ours.x[[1, 3, 5]].isnan().all()
    assert torch.allclose(ours.x[good], theirs.x[good], rtol=1e-10)
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 7, generator=g, dtype=torch.float64)
    pairs = zip(
        torch.autograd.grad((ours.x[good] ** 3), data, weight, create_graph=True),
        torch.autograd.grad((theirs.x[good] ** 3), data, weight, create_graph=True),
        torch.autograd.grad((solve_qp(*data, on_failure="nan").x[good] ** 3), data, weight),
        strict=True,
    )
    for a, b, plain in pairs:
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-10)
        assert torch.allclose(plain, b, rtol=1e-9, atol=1e-10)
        assert (plain[[1, 3, 5]] == 0).all()
        assert (plain[0] != 0).any()
    assert torch.allclose(ours.jacobian("h")[good], theirs.jacobian("h")[good], rtol=1e-9, atol=1e-10)


@pytest.mark.usefixtures("_quiet")
def test_neighbours_that_fail_change_no_bit() -> None:
    data = [t.requires_grad_() for t in broken()]
    good = [0, 2, 4, 6, 7]
    solution = solve_qp(*data, on_failure="nan")
    gradients = torch.autograd.grad(solution.x[good].square().sum(), data)
    for i in good:
        alone = [t.detach()[i : i + 1].clone().requires_grad_() for t in data]
        single = solve_qp(*alone)
        assert torch.equal(single.x[0], solution.x[i])
        assert torch.equal(single.lam[0], solution.lam[i])
        for a, b in zip(torch.autograd.grad(single.x.square().sum(), alone), gradients, strict=True):
            assert torch.equal(a[0], b[i])


@settings(deadline=None, derandomize=True, max_examples=15)
@given(st.integers(0, 10000), st.booleans())
def test_the_status_of_the_torch_path(seed: int, shared: bool) -> None:
    """Small integers make ties, duplicate rows, weakly active rows and contradictions."""
    g = torch.Generator().manual_seed(seed)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=g).double()

    lead = () if shared else (6,)
    M = integers(*lead, 4, 4 - seed % 2)
    data = (M @ M.mT, integers(6, 4), integers(*lead, 1, 4), integers(6, 1), integers(*lead, 7, 4), integers(6, 7))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NonUniqueSolutionWarning)
        ours, theirs = (solve_qp(*data, solver=solver, on_failure="nan") for solver in ("auto", "torch"))
    assert torch.equal(ours.status, theirs.status)
    solved = ours.status == 0
    assert torch.allclose(ours.x[solved], theirs.x[solved], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("batch", "shared"), [(None, False), (2, False), (2, True)])
def test_derivatives_of_any_order(batch: int | None, shared: bool) -> None:
    leaves = known_qp(3, 1, 4, batch=batch, shared=shared, active=0.5, seed=3).leaves()

    def outputs(*data: Tensor) -> tuple[Tensor, ...]:
        return tuple(solve_qp(*data))[:3]

    assert torch.autograd.gradcheck(outputs, leaves)
    assert torch.autograd.gradcheck(outputs, leaves, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(outputs, leaves, fast_mode=batch is not None)
    x = solve_qp(*leaves).x
    several = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    together = torch.autograd.grad(x, leaves, several, retain_graph=True, is_grads_batched=True)
    one = [torch.autograd.grad(x, leaves, v, retain_graph=True) for v in several]
    for a, b in zip(together, zip(*one, strict=True), strict=True):
        assert torch.allclose(a, torch.stack(b), rtol=1e-10, atol=1e-12)


def test_under_transforms() -> None:
    data = given_data((6, 1, 8), 3)
    solution = solve_qp(*data)
    rule = vmap(jacrev(lambda *data: solve_qp(*data, solver="numba").x, argnums=5))
    assert torch.allclose(rule(*data), solution.jacobian("h"), rtol=1e-10, atol=1e-12)
    mapped = vmap(lambda p: solve_qp(data[0], p, *data[2:]).x)(data[1].expand(2, 3, 6))
    assert torch.allclose(mapped[1], solution.x, rtol=1e-12)


@pytest.mark.parametrize("refine", [True, False, "auto"])
def test_refinement(refine: bool | str) -> None:
    data = given_data((30, 4, 20), 4, condition=1e6)
    ours, theirs = (solve_qp(*data, refine=refine, solver=s).x for s in ("numba", "torch"))
    assert close(ours, theirs, 1e-8 if refine is False else 1e-11)


def test_float32_in_and_out() -> None:
    data = [t.float().requires_grad_() for t in given_data((6, 1, 8), 3)]
    solution = solve_qp(*data, solver="numba")
    assert solution.x.dtype == solution.lam.dtype == torch.float32
    assert all(t.dtype == torch.float32 for t in torch.autograd.grad(solution.x.sum(), data))


def test_a_changed_argument_is_noticed() -> None:
    data = [t.requires_grad_() for t in given_data((6, 1, 8), 3)]
    x = solve_qp(*data).x
    with torch.no_grad():
        data[4].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()


def test_strides_do_not_matter() -> None:
    data = given_data((6, 1, 8), 3)
    strided = [t.repeat_interleave(2, -1)[..., ::2].requires_grad_() for t in data]
    x = solve_qp(*strided).x
    assert torch.equal(x, solve_qp(*data).x)
    grad = torch.autograd.grad(x, strided, torch.ones(3, 1, dtype=torch.float64).expand(3, 6))
    assert torch.equal(grad[1], all_ones(data))


def all_ones(data: list[Tensor]) -> Tensor:
    p = data[1].clone().requires_grad_()
    return torch.autograd.grad(solve_qp(data[0], p, *data[2:]).x.sum(), p)[0]


def test_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "_installed", lambda module: False)
    data = given_data((6, 1, 8), 3)
    assert solve_qp(*data).solver == "torch"
    with pytest.raises(MissingSolverError, match=r'solver="numba" needs the package numba.*solver="torch"'):
        solve_qp(*data, solver="numba")


def test_a_change_in_any_file_of_the_kernels_compiles_them_again(tmp_path: Path) -> None:
    from newton_plugin.convex._compiled import jit
    from newton_plugin.convex._compiled.adjoint import adjoint
    from newton_plugin.convex._compiled.solve import solve

    copy = shutil.copytree(Path(jit.__file__).parent, tmp_path / "copy", ignore=shutil.ignore_patterns("__pycache__"))
    checksum = jit.source_sum.__wrapped__
    before = checksum(copy)
    for kernel in (solve, adjoint):
        assert kernel.py_func.__qualname__.endswith(f"_{before:08x}")
    files = {file.name: file for file in copy.iterdir()}
    assert {"solve.py", "linear.py", "rows.py"} <= files.keys()
    for file in files.values():
        text = file.read_text()
        file.write_text(text + "\n")
        assert checksum(copy) != before
        file.write_text(text)


def test_the_thresholds_of_both_paths_are_the_same() -> None:
    from newton_plugin.convex._active_set import judge, pivoting
    from newton_plugin.convex._active_set import solve as torch_solve
    from newton_plugin.convex._compiled import certify, solve_one
    from newton_plugin.convex._compiled import pivoting as compiled_pivoting
    from newton_plugin.convex._compiled import rows as compiled_rows
    from newton_plugin.convex._system import rows

    assert compiled_rows.DEPENDENT == rows._DEPENDENT
    assert compiled_pivoting._ROUNDS == pivoting._ROUNDS
    assert (certify.ROUNDING, certify.TIGHT) == (judge._ROUNDING, judge._TIGHT)
    assert certify.MOST_STEPS == judge._MOST_STEPS
    assert solve_one._ILL_CONDITIONED == torch_solve._ILL_CONDITIONED
