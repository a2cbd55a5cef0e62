"""look: plain steps stay plain, numbers are those of the pages, and nothing of the user's changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import newton_plugin as npl
from newton_plugin.testing import Cost, LookReport, Watch, Watching, look

N, M, K = 32, 6, 4


def problem(wrong: float = 0.0, count: int = 1024) -> tuple[Tensor, Tensor]:
    """Inputs and classes that a linear layer can tell apart, a share of them replaced at random."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, M, generator=generator)
    t = (x @ torch.randn(M, K, generator=generator)).argmax(-1)
    drawn = torch.rand(count, generator=generator) < wrong
    return x, torch.where(drawn, torch.randint(K, (count,), generator=generator), t)


class Training:
    """A plain loop of Adam, as a generator of (outputs, target)."""

    def __init__(self, wrong: float = 0.0, rate: float = 1e-2, graph: bool = True) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(M, 32), nn.Tanh(), nn.Linear(32, K))
        self.optimizer = torch.optim.Adam(self.net.parameters(), rate)
        self.x, self.t, self.graph = *problem(wrong), graph
        self.generator = torch.Generator().manual_seed(1)

    def batches(self, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(steps):
            at = torch.randint(len(self.x), (N,), generator=self.generator)
            y = self.net(self.x[at])
            yield (y if self.graph else y.detach()), self.t[at]
            assert all(p.grad is None or bool(p.grad.any()) for p in self.net.parameters())
            self.optimizer.zero_grad()
            F.cross_entropy(y, self.t[at]).backward()
            self.optimizer.step()


def parameters(training: Training) -> Tensor:
    return torch.cat([p.detach().flatten() for p in training.net.parameters()])


def test_the_training_that_is_looked_at_is_the_one_without() -> None:
    alone, looked = Training(), Training()
    for _ in alone.batches(12):
        pass
    state = torch.get_rng_state()
    report = look(F.cross_entropy, looked.batches(12), pairs=2)
    assert torch.equal(parameters(alone), parameters(looked))
    assert torch.equal(torch.get_rng_state(), state)
    assert report.steps == 12


def test_tail_and_spread_are_those_of_the_page() -> None:
    """Of the last third of the steps, by the lines of docs/when-it-helps.md, "Look first"."""
    batches = [(y.detach(), t) for y, t in Training().batches(9)]
    watched = look(F.cross_entropy, batches, pairs=0).watched["outputs"]
    for part, late in ((batches[:3], False), (batches[6:], True)):
        g = torch.cat([npl.newton_step(F.cross_entropy, y, t, curvature="norm").gradient for y, t in part]).double()
        squared = g.square().sum(1).sort(descending=True).values
        values = torch.linalg.eigvalsh(g.mT @ g / len(g))
        assert watched.tail(late) == pytest.approx(float(squared[: len(g) // 10].sum() / squared.sum()), rel=1e-6)
        spread = float(values[-1] / values[values > 1e-9 * values[-1]].mean())
        assert watched.spread(late) == pytest.approx(spread, rel=1e-5)


def test_wide_outputs_have_the_eigenvalues_of_each_batch() -> None:
    y = torch.randn(3, 20, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    watched = look(lambda y: y.cosh().sum(-1).mean(), [(batch,) for batch in y], pairs=0).watched["outputs"]
    g = y[-1].sinh()
    values = torch.linalg.eigvalsh(g @ g.mT / 20)
    assert watched.spread() == pytest.approx(float(values[-1] / values.mean()), rel=1e-9)
    torch.testing.assert_close(watched.eigenvalues()[-1], values, rtol=1e-9, atol=1e-9)


def test_readings_are_those_of_the_gated_rule() -> None:
    """A hook with structure="gated" on the same batches, whose training is plain as well."""
    training, ours = Training(wrong=0.3), Training(wrong=0.3)
    hook = npl.LossHook(structure="gated")
    read = []
    for y, t in training.batches(30):
        loss = hook(F.cross_entropy(y.clone(), t))
        torch.autograd.grad(loss, y, retain_graph=True)
        read.append(hook.diagnostics())
    watched = look(F.cross_entropy, ours.batches(30), pairs=0).watched["outputs"]
    for name in ("gate", "contradiction", "signal"):
        expected = sum(numbers[name] for numbers in read[20:]) / 10
        assert watched.reading(name) == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert math.isnan(watched.reading("no such reading"))


def test_wrong_labels_open_the_gate_and_the_advice_says_so() -> None:
    report = look(F.cross_entropy, Training(wrong=0.4).batches(80), steps=80, pairs=0)
    assert report.watched["outputs"].reading("gate") > 0.5
    assert report.advice.take == "default"
    assert "contradicts its body" in str(report)
    training = Training(wrong=0.4)
    sgd = torch.optim.SGD(training.net.parameters(), 0.1)
    assert look(F.cross_entropy, training.batches(80), optimizer=sgd, steps=80, pairs=0).advice.take == "gated"


def test_without_a_graph_no_last_layer_is_seen() -> None:
    report = look(F.cross_entropy, Training(graph=False).batches(15), pairs=0)
    assert math.isnan(report.watched["outputs"].reading("contradiction"))
    assert "nothing to be seen" in str(report)
    assert "last layer" in str(report)


class Changing(nn.Module):
    """Batch statistics, random numbers, and a tensor that is worked on in place."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(K)

    def forward(self, y: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(self.norm(y + 0.01 * torch.randn_like(y)), t)


def test_a_loss_with_a_state_is_copied() -> None:
    loss = Changing()
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    state = torch.get_rng_state()
    batches = [(y.detach(), t) for y, t in Training().batches(5)]
    report = look(loss, batches, pairs=2)
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())
    assert all(p.grad is None for p in loss.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert report.checks["outputs"].report is not None
    assert report.advice.take == "plain"


def test_a_fault_of_the_loss_leads_the_advice() -> None:
    batches = [(torch.randn(16, 3, generator=torch.Generator().manual_seed(k)),) for k in range(4)]
    report = look(lambda y: (0.5 * y + 0.5 * y.detach()).square().sum(-1).mean(), batches, pairs=0)
    assert report.advice.take == "mend"
    assert str(report).rstrip().endswith("mend that first.")


def test_a_wrapped_loss_sums_and_positions() -> None:
    batches = [(torch.randn(4, 10, 3, generator=torch.Generator().manual_seed(k)),) for k in range(3)]

    def total(y: Tensor) -> Tensor:
        return y.logsumexp(-1).sum()

    report = look(npl.newton_loss(total, damping=1e-9), batches, reduction="sum", feature_dims=-1, pairs=0)
    (boundary,) = report.boundaries
    assert (boundary.shape, boundary.samples, boundary.features) == ((4, 10, 3), 40, 3)
    checked = report.checks["outputs"]
    assert checked.report is not None
    assert checked.report.reduction.status == "ok"
    assert checked.report.gradient_differences.verdict == "agrees"


def test_many_samples_are_checked_in_part() -> None:
    y = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    report = look(F.mse_loss, [(y, y + 1)], pairs=0).checks["outputs"].report
    assert report is not None
    assert report.samples == 64
    assert report.gradient_differences.verdict == "agrees"


def test_watching_changes_nothing_but_rounding_also_with_terms_beside_and_two_heads() -> None:
    """Plain gradients and those under a hook that watches; float64."""

    def gradients(hook: npl.LossHook | None) -> list[Tensor]:
        torch.manual_seed(0)
        body, heads = nn.Linear(3, 8).double(), nn.ModuleList([nn.Linear(8, 2), nn.Linear(8, 3)]).double()
        x, t = torch.randn(12, 3, dtype=torch.float64), torch.zeros(12, dtype=torch.long)
        for _ in range(3):
            h = body(x).tanh()
            loss = (
                F.cross_entropy(heads[0](h), t) + 0.01 * F.mse_loss(heads[1](h), x) + 0.1 * body.weight.square().sum()
            )
            (loss if hook is None else hook(loss)).backward()
        return [p.grad for p in (*body.parameters(), *heads.parameters()) if p.grad is not None]

    hook = npl.LossHook(curvature=Watching())
    for ours, theirs in zip(gradients(hook), gradients(None), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)
    assert len(hook.last_steps) == 2
    assert {"gate", "contradiction", "signal"} <= hook.diagnostics().keys()


def test_a_watch_of_ones_own() -> None:
    training, watch = Training(), Watch()
    hook = npl.LossHook(curvature=Watching())
    for at in range(12):
        training.optimizer.zero_grad()
        hook(F.cross_entropy(training.net(training.x[at : at + N]), training.t[at : at + N])).backward()
        training.optimizer.step()
        watch.add(hook.boundaries, hook.last_steps)
    watch.not_checked(hook.boundaries[0].name, "nobody asked")
    report = watch.report(Cost.of_pairs([(1.0, 2.0), (2.0, 2.0), (1.0, 1.5)], "a step", "the default"))
    assert len(watch) == report.steps == 12
    assert (report.cost.plain, report.cost.ratio, report.cost.pairs) == (1.0, 1.5, 3)
    assert "Cost: 1.50 times a step of 1e+03 ms, with the default (median of 3 pairs, alternating)" in str(report)
    assert "was not possible: nobody asked." in str(report)
    with pytest.raises(npl.ArgumentError, match="watch must have seen at least one step; got none"):
        Watch().report()


def test_the_report_reads_well() -> None:
    report = look(F.cross_entropy, Training().batches(12), pairs=1)
    lines = str(report).splitlines()
    assert lines[0] == "12 plain steps"
    assert lines[2] == f"Outputs 'outputs' of shape ({N}, {K}), {N} samples (dim 0) x {K} features"
    assert max(map(len, lines)) <= 110
    for row in ("beside ", "last layer ", "tail ", "spread ", "contradiction "):
        assert sum(line.strip().startswith(row) for line in lines[:9]) == 1, row
    assert any(line.startswith("Cost: ") for line in lines)
    assert "Available: curvature='fisher', 'norm', 'hessian'." in lines
    assert str(report).count("Recommended: ") == 1


class Axes:
    """Stands for matplotlib's: keeps what is drawn."""

    def __init__(self) -> None:
        self.drawn: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: self.drawn.append((name, *args))

    transAxes = None

    def has_data(self) -> bool:
        return bool(self.drawn)


class Figure:
    def __init__(self) -> None:
        self.axes = [Axes() for _ in range(3)]

    def subplots(self, rows: int, columns: int) -> list[Axes]:
        assert (rows, columns) == (1, 3)
        return self.axes

    def suptitle(self, text: str) -> None:
        self.title = text

    def set_layout_engine(self, name: str) -> None:
        pass


def points(axes: Axes, name: str) -> list[tuple[Any, ...]]:
    return [drawn[1:] for drawn in axes.drawn if drawn[0] == name]


def test_the_picture_shows_eigenvalues_sizes_and_errors() -> None:
    report: LookReport = look(F.cross_entropy, Training().batches(6), pairs=0)
    figure = Figure()
    report.draw(figure)
    ((steps, values, _),) = points(figure.axes[0], "semilogy")
    assert len(steps) == len(values) == 6 * (K - 1), "rows of softmax gradients add up to zero: one eigenvalue is 0"
    first, last = points(figure.axes[1], "semilogy")
    assert first[1] == sorted(first[1], reverse=True)
    assert len(last[1]) == 2 * N
    ((sizes, errors, _),) = points(figure.axes[2], "loglog")
    assert max(errors) < 1e-5 * max(sizes)


@pytest.mark.parametrize(
    ("call", "kind", "match"),
    [
        (lambda: look(3, []), npl.ArgumentTypeError, "loss_fn must be callable; got int"),  # type: ignore[arg-type]
        (lambda: look(F.mse_loss, []), npl.ArgumentError, r"batches must hold at least one batch, \(outputs, \*args\)"),
        (
            lambda: look(F.mse_loss, [torch.ones(2)]),
            npl.ArgumentTypeError,
            "batches must hold sequences .*; got Tensor",
        ),
        (lambda: look(F.mse_loss, [([1.0], 2)]), npl.ArgumentTypeError, "outputs must be a torch.Tensor; got list"),
        (lambda: look(F.mse_loss, [], steps=0), npl.ArgumentError, "steps must be an integer of 1 or more; got 0"),
        (lambda: look(F.mse_loss, [], pairs=-1), npl.ArgumentError, "pairs must be an integer of 0 or more; got -1"),
    ],
)
def test_wrong_arguments(call: Callable[[], LookReport], kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match):
        call()
