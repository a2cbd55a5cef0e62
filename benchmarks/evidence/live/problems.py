"""The live problems by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from benchmarks.evidence.live.pinn import POINTS, Physics
from benchmarks.evidence.live.regression import Diabetes, NoisyRegression
from benchmarks.evidence.live.task import Task
from benchmarks.evidence.live.two_heads import TwoHeads
from benchmarks.evidence.live.vae import Autoencoder
from benchmarks.evidence.training.arms import ARMS, configurations

__all__ = ["LIVE", "LiveProblem"]

FACTORS = {"diabetes_sgd": 0.1, "pinn_adam": 2.0, "pinn_sgd": 0.02}
"""Set on the tuning seeds and validation data of plain training alone; problems that are not here have 1."""


@dataclass(frozen=True)
class LiveProblem:
    """A task with an optimizer: the attributes of a problem that the plan of the runs and the tables read.

    Attributes:
        name, title: for lines and for tables.
        task: what is trained.
        optimizer: "adam", or "sgd" with momentum .9; both fall to zero by a cosine.
        steps, batch: of a training; a batch of all samples is the data in their order.
        factor: of all learning rates of this problem, so that plain's best one lies inside its grid.
        table: the group that is corrected together, and the name of its file of lines.
        sharpnesses: none: these losses have nothing to choose.
        without: arms that are left out.
    """

    name: str
    title: str
    task: Task
    optimizer: Literal["adam", "sgd"]
    steps: int = 400
    batch: int = 32
    factor: float = 1.0
    table: str = "live"
    sharpnesses: tuple[float, ...] = field(default=(), init=False)
    without: tuple[str, ...] = ("plain, textbook",)

    def configurations(self, arm: str) -> list[tuple[float, float | None]]:
        """(learning rate, second number) that an arm of this name chooses from: six."""
        return [(self.factor * rate, second) for rate, second in configurations(ARMS[arm], self.optimizer)]


def _problems() -> list[LiveProblem]:
    tasks: dict[str, tuple[str, Task]] = {
        "diabetes": ("diabetes, squared error", Diabetes()),
        "noisy_regression": ("a smooth function, targets with outliers", NoisyRegression()),
        "two_heads_1": ("two heads, weights 1 and 1", TwoHeads(1.0)),
        "two_heads_01": ("two heads, weights 1 and .1", TwoHeads(0.1)),
        "two_heads_001": ("two heads, weights 1 and .01", TwoHeads(0.01)),
        "uncertainty_weights": ("two heads, learned weights", TwoHeads(None)),
        "vae": ("variational autoencoder", Autoencoder()),
        "pinn": ("physics-informed network", Physics()),
    }
    made = []
    for name, (title, task) in tasks.items():
        steps, batch = (200, POINTS) if name == "pinn" else (400, 32)
        for optimizer in ("adam", "sgd"):
            full = f"{name}_{optimizer}"
            title_of = f"{title}, {optimizer}"
            made.append(LiveProblem(full, title_of, task, optimizer, steps, batch, FACTORS.get(full, 1.0)))
    return made


LIVE: dict[str, LiveProblem] = {problem.name: problem for problem in _problems()}
