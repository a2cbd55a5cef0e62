"""Hessians of outputs too many to form: Krylov spaces per sample, a sketch of the mean; and the memory they take."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import twins
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import newton_plugin as npl
from newton_plugin._derivatives.sample_hessians import SampleHessians
from newton_plugin._linalg import sketch as sketch_module
from newton_plugin._linalg.diagonal_rank_one import DiagonalRankOne
from newton_plugin._linalg.krylov import KrylovOptions, lockstep_power
from newton_plugin._linalg.sketch import Sketch, probes_for, sketch, sketch_of_rows

quick = settings(deadline=None, derandomize=True, max_examples=25)
D = torch.tensor(0.1, dtype=torch.float64)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrices(n: int, m: int, seed: int, lowest: float, rank: int | None = None) -> Tensor:
    """Symmetric, eigenvalues in [lowest, 3]."""
    q = torch.linalg.qr(torch.randn(n, m, m, generator=generator(seed), dtype=torch.float64)).Q
    values = torch.rand(n, m, generator=generator(seed + 1), dtype=torch.float64) * (3 - lowest) + lowest
    if rank is not None:
        values[:, rank:] = 0
    return q @ torch.diag_embed(values) @ q.mT


def products_of(h: Tensor) -> Any:
    return lambda v: torch.einsum("nij,...nj->...ni", h, v)


@quick
@given(
    n=st.integers(1, 5),
    m=st.integers(1, 30),
    seed=st.integers(0, 1000),
    lowest=st.sampled_from([0.0, -0.05, -2.0, -3.5]),
    power=st.sampled_from([1, 0.5]),
)
def test_a_krylov_space_that_is_complete_gives_the_dense_step(
    n: int, m: int, seed: int, lowest: float, power: float
) -> None:
    h, g = matrices(n, m, seed, lowest), torch.randn(n, m, generator=generator(seed), dtype=torch.float64)
    ours = lockstep_power(products_of(h), g, D, power, KrylovOptions(1e-13, 64)).step
    values, vectors = torch.linalg.eigh(h)
    inside = (values.abs() + 0.1) ** -power * (vectors.mT @ g.unsqueeze(-1)).squeeze(-1)
    assert twins.relative_error(ours, (vectors @ inside.unsqueeze(-1)).squeeze(-1)) <= 1e-7
    for i in range(n):
        if not -0.1 < float(values[i, 0]) < 0:  # there the dense repair takes l + d
            assert twins.relative_error(ours[i], twins.power_solve(h[i], 0.1, g[i], power)) <= 1e-7


@quick
@given(
    products=st.integers(1, 12), seed=st.integers(0, 1000), lowest=st.sampled_from([0.0, -3.0]), d=st.floats(1e-6, 10)
)
def test_never_uphill_and_never_longer_than_the_damping_allows(
    products: int, seed: int, lowest: float, d: float
) -> None:
    h, g = matrices(4, 40, seed, lowest), torch.randn(4, 40, generator=generator(seed), dtype=torch.float64)
    damping = torch.tensor(d, dtype=torch.float64)
    step = lockstep_power(products_of(h), g, damping, 1, KrylovOptions(1e-13, products)).step
    assert bool(((step * g).sum(-1) > 0).all())
    assert bool((step.norm(dim=-1) <= g.norm(dim=-1) / d * (1 + 1e-9)).all())


def test_the_iterates_are_those_of_conjugate_gradients() -> None:
    h, g = matrices(1, 50, 0, 0.0), torch.randn(1, 50, generator=generator(0), dtype=torch.float64)
    a, x, r = h[0] + 0.1 * torch.eye(50).double(), torch.zeros(50).double(), g[0].clone()
    p = r.clone()
    for k in range(1, 9):
        alpha = (r @ r) / (p @ a @ p)
        x, new = x + alpha * p, r - alpha * (a @ p)
        p, r = new + (new @ new) / (r @ r) * p, new
        ours = lockstep_power(products_of(h), g, D, 1, KrylovOptions(1e-13, k)).step
        assert twins.relative_error(ours[0], x) <= 1e-11


def test_the_residual_is_what_the_tolerance_says() -> None:
    h, g = matrices(6, 300, 3, 0.0), torch.randn(6, 300, generator=generator(3), dtype=torch.float64)
    counts = []
    for tolerance in (1e-1, 1e-3, 1e-6, 1e-9):
        products: list[Tensor] = []

        def counted(v: Tensor, products: list[Tensor] = products) -> Tensor:
            products.append(products_of(h)(v))
            return products[-1]

        taken = lockstep_power(counted, g, D, 1, KrylovOptions(tolerance, 200))
        residual = g - products_of(h)(taken.step) - 0.1 * taken.step
        assert float((residual.norm(dim=-1) / g.norm(dim=-1)).max()) <= 1.01 * tolerance
        counts.append(len(products))
    assert counts == sorted(counts)
    assert counts[-1] < 100


def test_a_gradient_that_is_zero_or_an_eigenvector() -> None:
    h = matrices(3, 20, 1, -1.0)
    g = torch.linalg.eigh(h).eigenvectors[:, :, 0].clone()
    g[1] = 0
    taken = lockstep_power(products_of(h), g, D, 1, KrylovOptions(1e-12, 20))
    lowest = torch.linalg.eigvalsh(h)[:, :1].abs()
    assert twins.relative_error(taken.step, g / (lowest + 0.1)) <= 1e-9
    assert bool((taken.step[1] == 0).all())


def hard_loss(y: Tensor) -> Tensor:
    """Indefinite, coupled within a sample, never the same for two samples."""
    return ((3 * y).sin().sum(-1) + 0.5 * (y[:, 1:] * y[:, :-1]).square().sum(-1)).mean()


@pytest.mark.parametrize(("damping", "extra"), [(npl.Tikhonov(0.1), 0), (npl.AutoDamping(), 1)])
def test_an_unknown_hessian_of_many_outputs_takes_nine_products_at_most(damping: Any, extra: int) -> None:
    """Eight, whatever the spectrum; fewer where all samples have converged; one more for a damping that asks for H's
    scale."""
    for lowest, most in ((-1.0, 8), (0.9, 4)):
        h, counted = matrices(4, 200, 0, lowest), [0]

        def product(vectors: Tensor, h: Tensor = h, counted: list[int] = counted) -> Tensor:
            counted[0] += len(vectors)
            return torch.einsum("nij,knj->kni", h, vectors)

        curvature, g = npl.Hessian("per_sample"), torch.randn(4, 200, generator=generator(1), dtype=torch.float64)
        curvature.step(g, product, damping)  # also asks, once, whether the samples are coupled
        counted[0] = 0
        taken = curvature.step(g, product, damping)
        assert counted[0] <= most + extra
        assert extra or counted[0] == most
        theirs = lockstep_power(products_of(h), g, taken.damping, 1, KrylovOptions())
        assert twins.relative_error(taken.step, theirs.step) <= 1e-12


def test_gradients_of_zero_are_no_hessian_of_zero() -> None:
    """With a fixed damping the first product is that with the gradient, which is zero at an optimum."""
    h, g = matrices(4, 200, 0, 0.5), torch.zeros(4, 200, dtype=torch.float64)
    taken = npl.Hessian("per_sample").step(g, products_of(h), npl.Tikhonov(0.1))
    assert not bool(taken.zero_hessian)
    assert bool((taken.step == 0).all())


@pytest.mark.parametrize("power", [1, 0.5])
def test_wide_per_sample_hessians_of_a_loss(power: float) -> None:
    y = torch.randn(3, 150, generator=generator(0), dtype=torch.float64)
    g, h = twins.gradients_and_hessians(hard_loss, y)
    assert float(torch.linalg.eigvalsh(h).min()) < -1, "or nothing is repaired here"
    theirs = twins.step(g, h, "hessian", "per_sample", power, 0.5)
    for tolerance, error in ((1e-12, 1e-8), (1e-3, 0.05)):
        curvature = npl.Hessian("per_sample", power, tolerance=tolerance, products=150)
        taken = npl.newton_step(hard_loss, y, curvature=curvature, damping=0.5)
        assert taken.curvature is None
        assert twins.relative_error(taken.step, theirs) <= error


def test_probes_are_those_of_the_cpu_and_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any device: what is asked of the device of the tensor is a copy (here to "meta", which has no numbers)."""
    drawn: list[torch.device] = []

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        drawn.append(kwargs["generator"].device)
        return randint(*args, **kwargs)

    randint = torch.randint
    monkeypatch.setattr(torch, "randint", spy)
    monkeypatch.setattr(sketch_module, "_PROBES", {})
    like = torch.zeros(2, 90, dtype=torch.float64)
    with torch.inference_mode():
        w = probes_for(like)
    assert not w.is_inference()
    assert torch.equal(w, sketch_module.random_signs((32, 90), like)), "the numbers of the CPU's generator"
    assert probes_for(like[:1]) is w
    other = probes_for(like.to("meta"))
    assert other.device.type == "meta"
    assert other is probes_for(like.to("meta"))
    assert drawn == [torch.device("cpu")] * 3
    for m in range(300, 320):
        assert probes_for(like.new_zeros(m)).shape == (32, m)
        assert len(sketch_module._PROBES) <= 4
    assert torch.equal(probes_for(like), w), "drawn anew, the same"


@pytest.mark.parametrize("rank", [0, 1, 7, 16])
@pytest.mark.parametrize("lowest", [0.0, -2.0])
def test_a_sketch_is_exact_up_to_its_rank(rank: int, lowest: float) -> None:
    c = matrices(1, 90, 5, lowest, rank)[0]
    w, g = probes_for(c), torch.randn(4, 90, generator=generator(5), dtype=torch.float64)
    found = sketch(w, w @ c)
    for power in (1, 0.5):
        theirs = torch.stack([twins.power_solve(c, 0.1, x, power) for x in g])
        assert twins.relative_error(found.inverse(D, power)(g), theirs) <= 1e-8
    assert abs(float(found.scale() - torch.linalg.matrix_norm(c) / 90**0.5)) <= 0.35 * float(found.scale())


def test_a_sketch_of_low_rank_plus_identity() -> None:
    """Not of low rank, but what a sketch is of: the step's error is that of the estimated trace."""
    c = matrices(1, 400, 6, 0.0, 8)[0] * 20 + 0.5 * torch.eye(400).double()
    w, g = probes_for(c), torch.randn(4, 400, generator=generator(6), dtype=torch.float64)
    found = sketch(w, w @ c)
    assert abs(float(found.rest) - 0.5) <= 0.05
    theirs = torch.stack([twins.power_solve(c, 0.1, x, 1) for x in g])
    assert float((found.inverse(D, 1)(g) - theirs).norm() / theirs.norm()) <= 0.1


def test_sketches_of_rows_are_exact() -> None:
    rows = torch.randn(5, 60, generator=generator(7), dtype=torch.float64)
    rows[4] = rows[3]  # rank 4
    weight = torch.tensor(0.2, dtype=torch.float64)
    found, c = sketch_of_rows(rows, 0.2 * rows @ rows.mT, weight), 0.2 * rows.mT @ rows
    g = torch.randn(3, 60, generator=generator(8), dtype=torch.float64)
    for power in (1, 0.5):
        theirs = torch.stack([twins.power_solve(c, 0.1, x, power) for x in g])
        assert twins.relative_error(found.inverse(D, power)(g), theirs) <= 1e-10
    assert abs(float(found.scale() - torch.linalg.matrix_norm(c) / 60**0.5)) <= 1e-10


def test_the_mean_of_wide_hessians_is_sketched_and_averaged_exactly() -> None:
    """Sums of sketches are sketches of sums: with the running mean, the step of C's own running mean."""
    n, m = 3, 1030
    curvature, damping = npl.Hessian(), npl.AutoDamping(0.3, decay=0.9, floor=0)
    c, weight = torch.zeros(m, m, dtype=torch.float64), 0.0
    for seed in range(2):
        factors = torch.randn(n, 4, m, generator=generator(seed), dtype=torch.float64)  # H_i of rank 4, C of rank 12
        signs = torch.tensor([1.0, 1, 1, -1], dtype=torch.float64)
        g = torch.randn(n, m, generator=generator(seed + 9), dtype=torch.float64)

        def hvp(v: Tensor, factors: Tensor = factors, signs: Tensor = signs) -> Tensor:
            inner = torch.einsum("nrj,knj->knr", factors, v) * signs
            return torch.einsum("nrj,knr->knj", factors, inner)

        taken = curvature.step(g, hvp, damping)
        batch = torch.einsum("nri,r,nrj->ij", factors, signs, factors) / n
        c, weight = 0.9 * c + 0.1 * batch, 0.9 * weight + 0.1
    ours, own = taken.step, c / weight
    assert isinstance(curvature._kept.matrix, Sketch)
    # The mean has rank 24, the sketch 16: exact for the first batch, near for the second.
    theirs = torch.stack([twins.power_solve(own, float(taken.damping), x, 1) for x in g])
    assert torch.nn.functional.cosine_similarity(ours, theirs).min() > 0.98
    size = float(torch.linalg.matrix_norm(own)) / m**0.5
    assert abs(float(taken.damping) - 0.3 * size) <= 0.3 * 0.2 * size


def test_a_wide_mean_that_is_zero() -> None:
    y = torch.randn(4, 1100, generator=generator(0), dtype=torch.float64)
    with pytest.warns(UserWarning, match="the Hessian is zero"):
        ours = npl.newton_step(lambda v: (v.abs() + 0 * v.square()).sum(-1).mean(), y, curvature="hessian", damping=0.1)
    fisher = npl.newton_step(lambda v: v.abs().sum(-1).mean(), y, damping=0.1)
    assert twins.relative_error(ours.step, fisher.step) <= 1e-12


@pytest.mark.parametrize("structure", ["diagonal", "isotropic"])
def test_wide_diagonals_are_estimated(structure: Any) -> None:
    n, m = 48, 300
    factors = torch.randn(n, m, 40, generator=generator(2), dtype=torch.float64)
    h = factors @ factors.mT / 40 + torch.eye(m).double()
    g = torch.randn(n, m, generator=generator(0), dtype=torch.float64)
    taken = npl.Hessian(structure).step(g, products_of(h), npl.Tikhonov(0.1))
    exact = h.diagonal(dim1=1, dim2=2).mean(0)
    exact = exact.mean() if structure == "isotropic" else exact
    assert taken.matrix is not None
    assert float((taken.matrix - exact).norm() / exact.norm()) <= 0.1


class Alive(TorchDispatchMode):
    """Counts the floating numbers of all tensors alive that were made under it."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                storage = StorageWeakRef(tensor.untyped_storage())
                self.alive[storage.cdata] = storage, tensor.untyped_storage().nbytes() // tensor.element_size()
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


def softmax_hessians(y: Tensor) -> SampleHessians:
    p = torch.softmax(y, -1)
    return SampleHessians.of_rank_one(DiagonalRankOne(p, torch.ones(len(p), dtype=p.dtype), p))


def chain_product(y: Tensor) -> Any:
    """H of 1/2 sum cos(y_j) y_(j+1) ..., tridiagonal; O(K N m)."""

    def product(v: Tensor) -> Tensor:
        out = y.cos() * v
        out[..., 1:] += 0.3 * v[..., :-1]
        out[..., :-1] += 0.3 * v[..., 1:]
        return out

    return product


LINEAR = [
    # curvature, what it is given, the most it may take in units of N m
    (lambda: npl.EmpiricalFisher(), None, 8),
    (lambda: npl.EmpiricalFisher(refresh_every=4), None, 8),
    (lambda: npl.EmpiricalFisher("per_sample"), None, 8),
    (lambda: npl.EmpiricalFisher("diagonal"), None, 8),
    (lambda: npl.Hessian(), softmax_hessians, 12),
    (lambda: npl.Hessian("per_sample"), softmax_hessians, 14),
    (lambda: npl.Hessian("diagonal"), softmax_hessians, 8),
    (lambda: npl.Hessian("per_sample", products=16), chain_product, 30),
    (lambda: npl.Hessian("diagonal"), chain_product, 10),
    (lambda: npl.Hessian("isotropic"), chain_product, 10),
]


@pytest.mark.parametrize(("make", "given_", "most"), LINEAR)
@pytest.mark.parametrize(("n", "m"), [(20, 2000), (20, 8000)])
@pytest.mark.parametrize("damping", [npl.Tikhonov(0.1), npl.AutoDamping()], ids=["fixed", "auto"])
def test_memory_is_linear_in_samples_times_features(
    make: Any, given_: Any, most: float, n: int, m: int, damping: Any
) -> None:
    g, y = torch.randn(2, n, m, generator=generator(0), dtype=torch.float64)
    hvp = None if given_ is None else given_(y)
    with Alive() as alive:
        taken = make().step(g, hvp, copy.deepcopy(damping))
    assert bool(torch.isfinite(taken.step).all())
    assert alive.peak <= most * n * m, f"{alive.peak / (n * m):.1f} N m"


def test_memory_of_a_sketch_does_not_grow_with_the_square_of_the_features() -> None:
    """32 probes and their products: 64 m and some; their products with each sample are taken a chunk at a time."""
    m = 8000
    g, y = torch.randn(2, 20, m, generator=generator(0), dtype=torch.float64)
    with Alive() as alive:
        npl.Hessian().step(g, chain_product(y), npl.Tikhonov(0.1))
    assert alive.peak <= 300 * m + 3 * 32 * 20 * m < 0.1 * m**2 * 20


def test_memory_is_refused_before_it_is_taken() -> None:
    g = torch.zeros(1, 1, dtype=torch.float64).expand(400, 40000)  # takes nothing itself
    with Alive() as alive, pytest.raises(npl.OutputsTooLargeError, match=r"Krylov spaces of 16 products of 2.6 GiB"):
        npl.Hessian("per_sample", products=16).step(g, lambda v: v, npl.Tikhonov(0.1))
    assert alive.peak == 0


@pytest.mark.parametrize(
    ("options", "kind", "match"),
    [
        ({"tolerance": 0}, ValueError, r"tolerance must be positive and finite; got 0. It is relative to the norm"),
        ({"tolerance": "x"}, TypeError, r"tolerance must be a positive number; got 'x'"),
        ({"products": 0}, ValueError, r"products must be a positive integer; got 0. Fewer make a step more cautious"),
        ({"products": 2.0}, TypeError, r"products must be a positive integer; got 2.0"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match):
        npl.Hessian("per_sample", **options)
