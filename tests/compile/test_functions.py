"""Inside ``torch.compile`` every autograd Function of the package, and what is built on it, is as outside.

The compiler (torch 2.6 to 2.13) follows ``forward`` where no input asks for a gradient, and gives a forward of variable
length its arguments one place off. So each Function is a graph break.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.compile.functions import CASES, Case, randn
from torch import Tensor

import newton_plugin
from newton_plugin.convex import BPQPLayer, ConvexLayer, solve_qp

pytestmark = [
    # Of the compiler's own parts.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning:torch"),
]
BACKENDS = [
    "eager",
    pytest.param("aot_eager", marks=pytest.mark.slow),
    pytest.param("inductor", marks=pytest.mark.slow),
]
MODES: dict[str, Callable[[], Any]] = {
    "plain": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}
# Of the pure engine in eager mode. Compiled, it writes them out or does without; tests/functional compiles it.
NOT_COMPILED = {"_Attach", "_Held", "_InSize", "_Keep", "_Kept"}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def functions() -> set[type[torch.autograd.Function]]:
    """All autograd Functions that the package defines."""
    for module in pkgutil.walk_packages(newton_plugin.__path__, "newton_plugin."):
        if "_compiled" in module.name:
            pytest.importorskip("numba")
        importlib.import_module(module.name)
    found, rest = set(), [torch.autograd.Function]
    while rest:
        below = rest.pop().__subclasses__()
        rest += below
        found |= {c for c in below if c.__module__.startswith("newton_plugin.") and not c.__name__.endswith("Backward")}
    return {c for c in found if c.forward is not torch.autograd.Function.forward}


def test_each_function_has_a_case_and_breaks_the_graph() -> None:
    names = {function if isinstance(function, str) else function.__name__ for function, _ in CASES.values()}
    reached = {c for c in functions() if c.__name__ not in NOT_COMPILED}
    assert {c.__name__ for c in reached} == names
    for function in reached:
        assert isinstance(function.forward, functools.partial), f"{function} lacks the decorator `untraced`"


def outcome(case: Case, wanted: tuple[bool, ...], mode: str) -> tuple[list[Tensor], list[Any]]:
    """The outputs, and the gradients of a random linear function of those that have one."""
    f, tensors = case
    inputs = [t.clone().requires_grad_(asks) for t, asks in zip(tensors, wanted, strict=True)]
    with MODES[mode]():
        out = f(*inputs)
    out = list(out) if isinstance(out, tuple) else [out]
    live = [t for t in out if t.requires_grad and mode == "plain"]
    leaves = [t for t in inputs if t.requires_grad]
    weights = [randn(*t.shape, seed=9).to(t.dtype) for t in live]
    gradients = torch.autograd.grad(live, leaves, weights, allow_unused=True) if live else []
    return [t.detach() for t in out], [len(live), *gradients]


def check(make: Callable[[int], Case], backend: str, wanted: tuple[bool, ...], mode: str, dynamic: bool | None) -> None:
    """Equal to the bit outside and inside, for two batch sizes one after the other."""
    torch._dynamo.reset()
    for batch in (2, 5):
        f, tensors = make(batch)
        expected = outcome((f, tensors), wanted, mode)
        ours = outcome((torch.compile(f, backend=backend, dynamic=dynamic), tensors), wanted, mode)
        for a, b in zip(itertools.chain(*ours), itertools.chain(*expected), strict=True):
            where = f"{wanted=}, {mode=}, {dynamic=}, {batch=}"
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14, equal_nan=True, msg=lambda m: f"{where}\n{m}")  # noqa: B023


@pytest.mark.parametrize("name", CASES)
def test_a_function_alone(name: str) -> None:
    make = case(name)
    count = len(make(2)[1])
    for wanted in {(False,) * count, (True,) + (False,) * (count - 1), (True,) * count}:
        check(make, "eager", wanted, "plain", None)
    for mode in ("no_grad", "inference"):
        check(make, "eager", (True,) * count, mode, None)
    check(make, "eager", (False,) * count, "plain", True)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", CASES)
def test_a_function_alone_in_every_way(name: str, backend: str) -> None:
    make = case(name)
    count = len(make(2)[1])
    for wanted in itertools.product((False, True), repeat=count):
        for mode, dynamic in itertools.product(MODES, (None, True)):
            check(make, backend, wanted, mode, dynamic)


def case(name: str) -> Callable[[int], Case]:
    if name == "CompiledQP":
        pytest.importorskip("numba")
    if name == "SparseSolve":
        pytest.importorskip("scipy")
    return CASES[name][1]


def qp(batch: int, solver: str) -> Case:
    eye = torch.eye(4, dtype=torch.float64)

    def f(Q: Tensor, p: Tensor, h: Tensor) -> Any:
        return tuple(solve_qp(2 * Q, p, G=torch.cat((eye, -eye)), h=h, solver=solver))[:3]

    return f, (eye + 0.1, randn(batch, 4), torch.full((8,), 0.3, dtype=torch.float64))


def derivatives(batch: int, kind: str) -> Case:
    eye = torch.eye(4, dtype=torch.float64)

    def x(p: Tensor) -> Tensor:
        return solve_qp(eye + 0.1, p, G=eye, h=eye[0]).x

    def twice(p: Tensor) -> Tensor:
        if torch.is_inference_mode_enabled():
            return p
        with torch.enable_grad():
            p = p.detach().clone().requires_grad_()
            (g,) = torch.autograd.grad(x(p).pow(3).sum(), p, create_graph=True)
            return torch.autograd.grad(g.square().sum(), p)[0]

    return {
        "vmap": lambda p: torch.vmap(x)(p),
        "grad": lambda p: torch.func.grad(lambda q: x(q).pow(3).sum())(p),
        "jacobian": lambda p: solve_qp(eye + 0.1, p, G=eye, h=eye[0]).jacobian("h"),
        "autograd twice": twice,
    }[kind], (randn(batch, 4),)


def sparse(batch: int) -> Case:
    index = torch.arange(3 + batch).repeat(2, 1)

    def f(values: Tensor, p: Tensor) -> Tensor:
        n = p.shape[-1]
        Q = torch.sparse_coo_tensor(index, values, (n, n), check_invariants=True)
        G = torch.sparse_coo_tensor(index, torch.ones_like(p).detach(), (n, n), check_invariants=True)
        return solve_qp(Q, p, G=G, h=torch.full_like(p, 0.1)).x

    return f, (torch.full((3 + batch,), 2.0, dtype=torch.float64), randn(3 + batch))


DISC = ConvexLayer(
    lambda x, t: ((x - t[0]) ** 2).sum() + t[1] * x.sum(),
    inequality=lambda x, t: torch.linalg.vector_norm(x)[None] - 1,
    variables=3,
)
DOORS: dict[str, Callable[[int], Case]] = {
    "solve_qp, torch": lambda b: qp(b, "torch"),
    "solve_qp, auto": lambda b: qp(b, "auto"),
    "BPQPLayer": lambda b: (lambda p: 2 * BPQPLayer()(torch.eye(2), 3 * p), (randn(b, 2).float(),)),
    "ConvexLayer": lambda b: (lambda a, c: DISC((a, c)), (randn(3, seed=b), randn(1)[0])),
    "ConvexLayer, batch": lambda b: (lambda a, c: DISC((a, c), in_dims=(0, None)), (randn(b, 3), randn(1)[0])),
    "sparse": sparse,
    **{kind: lambda b, kind=kind: derivatives(b, kind) for kind in ("vmap", "grad", "jacobian", "autograd twice")},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DOORS)
def test_a_convex_program_inside(name: str, backend: str) -> None:
    if name == "sparse":
        pytest.importorskip("scipy")
    if name == "autograd twice" and backend != "eager":
        pytest.skip("what is compiled between two graph breaks has no second derivatives: an error of torch")
    count = len(DOORS[name](2)[1])
    ways = {("plain", True), ("plain", False), ("no_grad", True), ("inference", False)}
    for mode, asks in itertools.product(MODES, (False, True)) if backend == "aot_eager" else ways:
        check(DOORS[name], backend, (asks,) * count, mode, None)


def test_the_closed_form() -> None:
    """min |x|^2/2 + p'x has x = -p."""
    q = -torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    for solver in ("torch", "auto"):
        compiled = torch.compile(lambda p: solve_qp(torch.eye(2), p, solver=solver).x, backend="eager")  # noqa: B023
        assert compiled(q).tolist() == (-q).tolist()
        torch._dynamo.reset()


def test_whole_graphs_are_refused() -> None:
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(lambda p: solve_qp(torch.eye(2), p).x, backend="eager", fullgraph=True)(torch.ones(2))


def test_many_eager_functions_do_not_recompile() -> None:
    """The compiler gives up after compiling a function eight times; all eager functions share one wrapper."""
    from newton_plugin._runtime.compiler import eager

    seen: list[bool] = []

    def make(i: int) -> Callable[[Tensor], Tensor]:
        @eager
        def f(x: Tensor) -> Tensor:
            seen.append(torch.compiler.is_compiling())
            return x * i

        return f

    if not hasattr(torch._dynamo.config, "fail_on_recompile_limit_hit"):
        pytest.skip("torch 2.6 says it in a log message")
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for i, f in enumerate(make(i) for i in range(12)):
            assert torch.compile(lambda x: f(x + 1) * 2, backend="eager")(torch.ones(2)).tolist() == [4.0 * i] * 2  # noqa: B023
    assert seen == [False] * 12


def test_the_package_does_not_load_the_compiler() -> None:
    code = (
        "import sys, torch; from newton_plugin.convex import solve_qp; before = 'torch._dynamo' in sys.modules; "
        "solve_qp(torch.eye(2), torch.ones(2), solver='torch'); print(before, 'torch._dynamo' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]
