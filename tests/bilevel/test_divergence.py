"""A method that diverges says so, once, long before a number overflows; one that converges says nothing."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from newton_plugin import NonFiniteError
from newton_plugin.bilevel import BOREP, MASOBA, AccBO, DivergenceWarning, StocBiO, hypergradient
from newton_plugin.bilevel._methods import optimizer as shared

METHODS = [AccBO, MASOBA, BOREP, StocBiO]
every_method = pytest.mark.parametrize("method", METHODS)
Closures = tuple[Callable[[], Tensor], Callable[[], Tensor]]
L = 10.0  # the largest curvature


class Quadratic:
    """``F = |y - 1|^2/2 + c |x|^2/2`` above ``G = y'Hy/2 - x'y``, H with eigenvalues from ``least`` to L."""

    def __init__(self, method: Any, least: float = 0.5, dtype: torch.dtype = torch.float64, **options: Any) -> None:
        basis = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
        h = (basis @ torch.diag(torch.tensor([least, 0.7, 1.0, 3.0, L], dtype=torch.float64)) @ basis.T).to(dtype)
        self.x, self.y = (torch.zeros(5, dtype=dtype, requires_grad=True) for _ in range(2))
        self.optimizer = method([self.x], [self.y], **{"lr_upper": 0.02, "lr_lower": 0.1, **options})
        self.upper = lambda: (self.y - 1).square().sum() / 2 + self.x.square().sum() / 2
        self.lower = lambda: self.y @ h @ self.y / 2 - self.x @ self.y

    def run(self, steps: int) -> list[str]:
        """The warnings of some steps, with the steps at which they came."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", DivergenceWarning)
            for _ in range(steps):
                self.optimizer.step(self.upper, self.lower)
        return [str(w.message) for w in caught]

    def largest(self) -> float:
        held = [v for p in (self.x, self.y) for v in self.optimizer.state[p].values() if isinstance(v, Tensor)]
        return max(float(t.detach().abs().max()) for t in (self.x, self.y, *held))


@every_method
def test_nothing_is_said_of_a_method_that_converges(method: Any) -> None:
    for options in ({}, {"scale": 1 / L}, {"scale": 1.9 / L}, {"hvp": "finite_difference"}):
        problem = Quadratic(method, **options)
        assert problem.run(60) == []
        assert problem.largest() < 100


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "lr_lower beyond 2/L": (
        {"lr_lower": 0.26},
        r"the norm of lower_params is \S+; it was 0 at the first step\. Lower lr_lower=0\.26 \(the largest curvature "
        r"seen is (10|9\.\d); gradient steps are stable below 2/(10|9\.\d)\)",
    ),
    "scale beyond 2/L": (
        {"scale": 0.3},
        r"the solution of the linear system is \S+ times as long as stable iterations can make it\. Lower scale=0\.3",
    ),
    "a lower loss that is not convex": ({"least": -2.0}, r"add weight decay|Lower lr_lower"),
}


@every_method
@pytest.mark.parametrize("case", CASES)
def test_divergence_is_said_once_and_early(method: Any, case: str) -> None:
    options, match = CASES[case]
    problem = Quadratic(method, **options)
    said: list[str] = []
    for _ in range(400):
        said += problem.run(1)
        if said:
            break
    assert len(said) == 1
    assert problem.largest() < 1e9  # "3e16" was the figure that nobody had noticed
    with pytest.warns(DivergenceWarning, match=match):
        warnings.warn(said[0], DivergenceWarning, stacklevel=1)
    assert said[0].startswith(f"{method.__name__} diverges at step {problem.optimizer._progress['steps']}: ")
    assert problem.run(5) == []


@pytest.mark.parametrize("method", [MASOBA, StocBiO])
def test_upper_rates_that_are_too_large(method: Any) -> None:
    """(The other two methods move x by fixed lengths.)"""
    problem = Quadratic(method, lr_upper=100.0)
    (said,) = problem.run(20)
    assert "the norm of upper_params is" in said
    assert "Lower lr_upper=100, or see first that the lower level is trained: warm_start." in said


@pytest.mark.parametrize("method", [AccBO, MASOBA])
def test_a_solution_that_overflows_is_an_error(method: Any) -> None:
    """With normalised steps nothing else would show it: x moves by lr_upper in a direction without meaning."""
    problem = Quadratic(method, dtype=torch.float32, scale=0.3, lr_upper=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DivergenceWarning)
        for _ in range(200):
            before = [problem.x.detach().clone(), problem.y.detach().clone()]
            try:
                problem.optimizer.step(problem.upper, problem.lower)
            except NonFiniteError:
                break
        else:
            pytest.fail("no error in 200 steps")
    assert torch.equal(problem.x, before[0])
    assert torch.equal(problem.y, before[1])
    assert problem.largest() < torch.inf


@every_method
def test_warm_start_too(method: Any) -> None:
    problem = Quadratic(method, lr_lower=0.5)
    with torch.no_grad():
        problem.y += 1
    with pytest.warns(DivergenceWarning, match=r"diverges in warm_start: the norm of lower_params is"):
        problem.optimizer.warm_start(problem.lower, 30)


@every_method
def test_copies_and_checkpoints_remember(method: Any) -> None:
    """The sizes of the first step, and that it was said."""
    problem = Quadratic(method, lr_lower=0.26)
    assert len(problem.run(10 if method is StocBiO else 120)) == 1
    other = Quadratic(method, lr_lower=0.26)
    other.optimizer.load_state_dict(copy.deepcopy(problem.optimizer.state_dict()))
    assert other.run(3) == []
    assert other.optimizer._progress["start"] == [0.0, 0.0]
    # A checkpoint of an earlier version holds neither.
    held = copy.deepcopy(problem.optimizer.state_dict())
    for name in ("start", "reach", "diverges"):
        held["state"]["progress"].pop(name, None)
    other.optimizer.load_state_dict(held)
    other.run(3)
    assert other.optimizer._progress["start"] != [0.0, 0.0]


@every_method
def test_a_step_reads_the_device_once(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a step looks at comes in one read; ``numbers`` is the only place that reads."""
    reads: list[int] = []
    read = shared.numbers
    monkeypatch.setattr(shared, "numbers", lambda parts: reads.append(len(parts)) or read(parts))
    problem = Quadratic(method)
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        plain = getattr(Tensor, name)

        def counted(self: Tensor, plain: Any = plain, name: str = name) -> Any:
            if name != "tolist":
                pytest.fail(f"a step called Tensor.{name}")
            reads.append(0)
            return plain(self)

        monkeypatch.setattr(Tensor, name, counted)
    problem.optimizer.step(problem.upper, problem.lower)
    problem.optimizer.step(problem.upper, problem.lower)
    assert sum(1 for count in reads if count) == 2
    assert sum(1 for count in reads if not count) == 2


@pytest.mark.parametrize("solver", ["neumann", "linear"])
def test_a_hypergradient_with_too_large_a_scale(solver: Any) -> None:
    def found(**options: Any) -> Tensor:
        problem = Quadratic(MASOBA)
        return hypergradient(*_closures(problem), [problem.x], [problem.y], solver=solver, **options)[0]

    with pytest.warns(
        DivergenceWarning, match=r"hypergradient diverges: the solution .* Lower scale=0\.3, which must be"
    ):
        wrong = found(scale=0.3, terms=20)
    right = hypergradient(*_closures(problem := Quadratic(MASOBA)), [problem.x], [problem.y])[0]
    assert float((wrong - right).norm()) > 100 * float(right.norm())
    torch.testing.assert_close(found(terms=400), right, rtol=1e-6, atol=1e-8)


def _closures(problem: Quadratic) -> Closures:
    return problem.upper, problem.lower
