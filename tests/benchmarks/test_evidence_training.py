"""Replicas: networks trained side by side equal those trained alone, in an ordinary loop of PyTorch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from benchmarks.evidence.data.noise import ReplicaNoise
from benchmarks.evidence.problems.registry import problems
from benchmarks.evidence.rules.of_size import SoftNorm
from benchmarks.evidence.training.arms import ARMS, BASELINE, CANDIDATES, Arm
from benchmarks.evidence.training.replicas import Adam, Networks, Sgd, clip_by_norm
from benchmarks.evidence.training.runs import Run
from benchmarks.evidence.training.train import Trainer, train
from torch import Tensor, nn

import newton_plugin as npl

STEPS = 12
EVERY = problems()


@pytest.fixture(autouse=True)
def _float64() -> object:
    """Replicas and single runs sum in another order; in float64 that is nothing."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def _runs(problem: str, arm: str, count: int = 3) -> list[Run]:
    p = EVERY[problem]
    sharp = p.sharpnesses[0] if p.sharpnesses else None
    second = ARMS[arm].second if arm in ARMS else ()
    return [
        Run(
            problem,
            arm,
            1e-2 * (1 + r),
            second[r % len(second)] if second else None,
            sharp,
            STEPS,
            6,
            7 + r // 2,
            "search",
        )
        for r in range(count)
    ]


def _weights(problem: str, arm: str, runs: list[Run]) -> list[Tensor]:
    """Trained weights, (R, ...)."""
    trainer = Trainer(EVERY[problem], {**ARMS, **CANDIDATES}[arm], runs)
    for _ in zip(trainer.steps(), range(STEPS), strict=False):
        pass
    assert not trainer.mixed
    return [p.detach() for p in trainer.networks.parameters]


def _alone(problem: str, arm: Arm, run: Run) -> list[Tensor]:
    """The obvious twin: one network, torch.optim, the package's loss."""
    p = EVERY[problem]
    torch.manual_seed(run.seed)
    network = p.network()
    adam = p.optimizer == "adam"
    options = {"betas": (0.9, arm.beta2)} if adam else {"momentum": 0.9}
    optimizer = (torch.optim.Adam if adam else torch.optim.SGD)(network.parameters(), run.learning_rate, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, run.steps)
    rows = p.loss(run.sharpness, [run.seed], arm.textbook)
    squares: list[float] = []
    criterion = lambda outputs, targets: rows(outputs, targets).mean()  # noqa: E731
    if arm.newton is not None:
        curvature, damping = arm.newton(run.second)
        criterion = npl.NewtonLoss(criterion, curvature=curvature, damping=damping)
    for inputs, targets in p.batches([run.seed], run.batch, run.steps):
        optimizer.zero_grad()
        criterion(network(inputs[0].double()), targets[0]).backward()
        if arm.normalises:
            squares.append(sum(float(q.grad.square().sum()) for q in network.parameters()))  # type: ignore[union-attr]
            weights = [0.9**k for k in reversed(range(len(squares)))]
            size = (sum(w * v for w, v in zip(weights, squares, strict=True)) / sum(weights)) ** 0.5
            for q in network.parameters():
                q.grad /= size  # type: ignore[operator]
        if arm.clips:
            assert run.second is not None
            torch.nn.utils.clip_grad_norm_(network.parameters(), run.second)
        optimizer.step()
        schedule.step()
    return [q.detach() for q in network.parameters()]


def _close(stacked: list[Tensor], single: list[Tensor], r: int) -> None:
    for a, b in zip(stacked, single, strict=True):
        torch.testing.assert_close(a[r], b, rtol=1e-5, atol=1e-7)


@pytest.fixture
def _double_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Networks._forward
    monkeypatch.setattr(Networks, "_forward", lambda self, x, batched: forward(self, x.double(), batched))
    with_head = Networks.with_head
    monkeypatch.setattr(Networks, "with_head", lambda self, x: with_head(self, x.double()))


@pytest.mark.usefixtures("_double_inputs")
@pytest.mark.parametrize("arm", [name for name, arm in ARMS.items() if arm.rule is None or arm.newton is not None])
def test_replicas_are_what_they_are_alone(arm: str) -> None:
    runs = _runs("wrong_lists", arm)
    stacked = _weights("wrong_lists", arm, runs)
    for r, run in enumerate(runs):
        _close(stacked, _alone("wrong_lists", ARMS[arm], run), r)


@pytest.mark.usefixtures("_double_inputs")
@pytest.mark.parametrize(
    ("problem", "arm"),
    [
        ("linear_sgd", "Fisher"),
        ("wrong_labels", "soft normalisation"),
        ("cauchy_5", "Hessian"),
        ("for_l2", "isotropic"),
        ("fenchel_young_3", BASELINE),
        ("loss_score_3", "Hessian, fixed"),
        ("algorithm_difference_4", "Fisher"),
        ("ndcg_10", "Hessian"),
        ("ctc_4", "Fisher"),
        ("allocation_8", "isotropic"),  # a rule without memory would enlarge the rounding of batches without gradient
        ("allocation_8", "Hessian, fixed"),
    ],
)
def test_also_with_other_losses_and_with_noise_in_them(problem: str, arm: str) -> None:
    runs = _runs(problem, arm, 3)  # two learning rates of a seed, and another seed
    stacked = _weights(problem, arm, runs)
    for r in (1, 2):
        _close(stacked, _alone(problem, ARMS[arm], runs[r]), r)


def test_a_candidate_that_is_soft_normalisation_is_the_packages() -> None:
    torch.set_default_dtype(torch.float32)
    runs = _runs("single_10", "soft normalisation")
    ours = train(EVERY["single_10"], Arm(rule=lambda: SoftNorm(0.1)), runs)
    theirs = train(EVERY["single_10"], ARMS["soft normalisation"], runs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(torch.tensor(a["curve"]), torch.tensor(b["curve"]), rtol=0, atol=0.6)


@pytest.mark.parametrize("rule", CANDIDATES)
def test_candidates_take_finite_steps_downhill(rule: str) -> None:
    torch.set_default_dtype(torch.float32)
    runs = [replace(run, learning_rate=3e-3, steps=5) for run in _runs("wrong_lists", rule)]
    trainer = Trainer(EVERY["wrong_lists"], CANDIDATES[rule], runs)
    for _ in trainer.steps():
        pass
    assert not trainer.tally.kept.any()
    assert trainer.alive.all()


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_optimizers_are_torchs(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rates, steps = [0.1, 0.01], 20
    p = torch.randn(2, 3, generator=generator)
    ours = p.clone()
    optimizer = Adam([ours], rates, steps, beta2=0.95) if kind == "adam" else Sgd([ours], rates, steps)
    single = [nn.Parameter(row.clone()) for row in p]
    theirs = [
        torch.optim.Adam([q], rate, betas=(0.9, 0.95)) if kind == "adam" else torch.optim.SGD([q], rate, momentum=0.9)
        for q, rate in zip(single, rates, strict=True)
    ]
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, steps) for o in theirs]
    for _ in range(steps):
        g = torch.randn(2, 3, generator=generator)
        optimizer.step([g])
        for q, row, o, schedule in zip(single, g, theirs, schedules, strict=True):
            q.grad = row
            o.step()
            schedule.step()
    torch.testing.assert_close(ours, torch.stack([q.detach() for q in single]))


def test_clipping_is_torchs_for_each_replica() -> None:
    gradients = [torch.randn(3, 4, 2), torch.randn(3, 5)]
    most = torch.tensor([0.1, 1.0, 100.0])
    for r in range(3):
        single = [nn.Parameter(torch.zeros_like(g[r])) for g in gradients]
        for q, g in zip(single, gradients, strict=True):
            q.grad = g[r].clone()
        torch.nn.utils.clip_grad_norm_(single, float(most[r]))
        for q, g in zip(single, clip_by_norm(gradients, most), strict=True):
            torch.testing.assert_close(q.grad, g[r])


def test_noise_belongs_to_the_seed() -> None:
    together = ReplicaNoise([5, 6, 5]).sample(torch.zeros(2, 9, 4), None)
    torch.testing.assert_close(together[:, 3:6], ReplicaNoise([6]).sample(torch.zeros(2, 3, 4), None))
    torch.testing.assert_close(together[:, :3], together[:, 6:])
    assert not torch.equal(together[:, :3], together[:, 3:6])


def test_a_replica_that_is_lost_takes_no_other_with_it() -> None:
    torch.set_default_dtype(torch.float32)
    arm, runs = ARMS["Fisher"], _runs("single_10", "Fisher")
    alone = train(EVERY["single_10"], arm, [runs[1]])
    runs[0] = replace(runs[0], learning_rate=float("inf"))
    lost, whole, _ = train(EVERY["single_10"], arm, runs)
    assert not lost["finite"]
    assert lost["curve"][-1][1] == 0.0
    assert whole["finite"]
    torch.testing.assert_close(torch.tensor(whole["curve"]), torch.tensor(alone[0]["curve"]), rtol=0, atol=0.6)


def test_replicas_are_alike() -> None:
    runs = _runs("single_10", BASELINE)
    with pytest.raises(ValueError, match="differ in seed, learning rate and second number only"):
        Trainer(EVERY["single_10"], ARMS[BASELINE], [runs[0], replace(runs[1], steps=99)])
