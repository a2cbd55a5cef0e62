"""What the demo trains: two tasks at fixed hyperparameters, and the arms of each."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Arm:
    """One row of a table. ``against`` names the plain arm that it is paired with, seed by seed."""

    name: str
    loss: Literal["textbook", "neural_sort"]
    newton: dict[str, Any] | None = None  # arguments of NewtonLosses; None: no callback
    against: str = ""


@dataclass(frozen=True)
class Setting:
    """One table and one panel of the picture."""

    title: str
    n: int
    temperature: float
    learning_rate: float
    arms: tuple[Arm, ...]


@dataclass(frozen=True)
class Job:
    """One network to train."""

    setting: Setting
    arm: Arm
    seed: int
    steps: int


LONG = Setting(
    "10 images, temperature 0.1, Adam 1e-2",
    n=10,
    temperature=0.1,
    learning_rate=1e-2,
    arms=(
        Arm("textbook", "textbook"),
        Arm("textbook + Newton", "textbook", {}, against="textbook"),
        Arm("stable", "neural_sort"),
        Arm("stable + Newton", "neural_sort", {}, against="stable"),
        Arm("stable + full matrix", "neural_sort", {"structure": "mean"}, against="stable"),
    ),
)

SHARP = Setting(
    "5 images, temperature 0.005, Adam 3e-3",
    n=5,
    temperature=0.005,
    learning_rate=3e-3,
    arms=(
        Arm("textbook", "textbook"),
        Arm("textbook + Newton", "textbook", {}, against="textbook"),
        Arm("stable", "neural_sort"),
        Arm("stable + Newton", "neural_sort", {}, against="stable"),
    ),
)

SETTINGS = (LONG, SHARP)

LEGEND = """\
textbook: BCELoss on NeuralSort's soft permutation matrix. stable: RankingLoss,
the same number computed in the log domain. + Newton: NewtonLosses() added to
the Trainer. full matrix: NewtonLosses(structure="mean"), the paper's m x m
matrix in place of its size alone. difference: to the same loss without the
callback, paired seed by seed, with its 95 % interval. seconds: one run with its
validation, one thread, {workers} at a time. Learning rate and temperature were fixed
beforehand, the same in every arm, and not tuned for each: tuning can change the
order. The second temperature was chosen on validation images, so sharp that
float32 fails the textbook loss."""
