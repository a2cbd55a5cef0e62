"""What each part of ``damping="auto"`` is worth, on real digits and six losses.

    python -m benchmarks.auto_damping [--seeds 8] [--only A B control batch4]   # train what is missing
    python -m benchmarks.auto_damping --table                                  # print the tables, write the .md

A plain loop: MLP 64-64-32-1 (or -10), Adam, 1500 steps, one thread. All arms of a seed start from the same
weights and see the same batches in the same order, so they are compared seed by seed. Accuracy is on the
*validation* images: all ranks of a list of n right (2000 fixed lists), or the digit right (300 images).
Every run appends one line to results/auto_damping.jsonl; a run that has its line is not repeated.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from examples.digit_lists import DigitLists, digit_images
from scipy.stats import t as student
from torch import Tensor, nn

import newton_plugin as npl
from newton_plugin.algorithms import RankingLoss, neural_sort

RESULTS = Path(__file__).parent / "results"
LossFunction = Callable[[Tensor, Tensor], Tensor]
Batches = Iterator[tuple[Tensor, Tensor]]


def textbook(temperature: float) -> LossFunction:
    """What one would write down first: ``BCELoss`` on the soft permutation matrix, in float32."""

    def loss(scores: Tensor, ranks: Tensor) -> Tensor:
        soft = neural_sort(scores, temperature)  # rows are ranks
        return nn.BCELoss()(soft, nn.functional.one_hot(ranks, ranks.shape[-1]).mT.to(soft.dtype))

    return loss


@dataclass(frozen=True)
class Task:
    """A loss to train on.

    Attributes:
        title: for the tables.
        loss: of (outputs, target).
        learning_rate: Adam's at the first step.
        n: length of the lists to rank; 0 is classification of single images.
        random_labels: share of the training labels that are drawn anew, from all ten digits.
    """

    title: str
    loss: LossFunction
    learning_rate: float
    n: int = 0
    random_labels: float = 0.0


TASKS = {
    "A": Task("stable ranking loss, n=10, tau=.1", RankingLoss("neural_sort", temperature=0.1), 1e-2, n=10),
    "B": Task("textbook ranking loss, n=10, tau=.1", textbook(0.1), 1e-2, n=10),
    "C": Task("stable ranking loss, n=5, tau=.002", RankingLoss("neural_sort", temperature=0.002), 3e-3, n=5),
    "D": Task("textbook ranking loss, n=5, tau=.002", textbook(0.002), 3e-3, n=5),
    "E": Task("cross-entropy", nn.CrossEntropyLoss(), 1e-2),
    "F": Task("cross-entropy, 30 % random labels", nn.CrossEntropyLoss(), 1e-2, random_labels=0.3),
}

# What is left of AutoDamping: the running mean and the ratio.
BARE = {"growth": 1e300, "floor": 0.0, "own": 0.0}

# Functions, because a rule keeps a running state: every run has its own.
ARMS: dict[str, Callable[[], npl.LossHook | None]] = {
    "plain": lambda: None,
    "soft normalisation": lambda: npl.LossHook(curvature="norm"),
    "Fisher auto": lambda: npl.LossHook(structure="mean"),
    "Fisher auto, running mean only": lambda: npl.LossHook(structure="mean", damping=npl.AutoDamping(**BARE)),
    "Fisher auto, relative to the batch only": lambda: npl.LossHook(
        structure="mean", damping=npl.AutoDamping(decay=0.0, **BARE)
    ),
    "isotropic auto": lambda: npl.LossHook(structure="isotropic"),
    "Fisher 0.001": lambda: npl.LossHook(damping=1e-3),
    "Fisher 0.01": lambda: npl.LossHook(damping=1e-2),
    "Fisher 0.1": lambda: npl.LossHook(damping=1e-1),
    "Hessian auto": lambda: npl.LossHook(curvature="hessian"),
}
SMALL_BATCH_ARMS = ("plain", "soft normalisation", "Fisher auto", "isotropic auto")
CONTROL_RATES = (3e-3, 1e-2, 3e-2)


@dataclass(frozen=True)
class Run:
    """One training; equal fields, equal result."""

    task: str
    arm: str
    seed: int
    learning_rate: float
    schedule: str = "cosine"
    batch: int = 32
    steps: int = 1500


def sections(seeds: int, steps: int) -> dict[str, list[Run]]:
    """All runs by the table that they are for; two arms of "control" are those of "A"."""
    every = range(seeds)
    runs = {
        key: [Run(key, arm, s, task.learning_rate, steps=steps) for s in every for arm in ARMS]
        for key, task in TASKS.items()
    }
    runs["control"] = [
        Run("A", arm, s, rate, schedule, steps=steps)
        for s in every
        for arm in ("plain", "Fisher auto")
        for rate in CONTROL_RATES
        for schedule in ("cosine", "constant")
    ]
    runs["batch4"] = [replace(r, batch=4) for r in runs["E"] if r.arm in SMALL_BATCH_ARMS]
    return runs


def classification_batches(run: Run, random_labels: float) -> Batches:
    """Training images with replacement; which labels are wrong depends on the seed alone."""
    images, labels = digit_images("train")
    generator = torch.Generator().manual_seed(run.seed)
    redrawn = torch.rand(len(labels), generator=generator) < random_labels
    labels = torch.where(redrawn, torch.randint(10, labels.shape, generator=generator), labels)
    for index in torch.randint(len(labels), (run.steps, run.batch), generator=generator):
        yield images[index], labels[index]


def batches(run: Run, task: Task) -> Batches:
    """The training batches of a run, the same for all its arms."""
    if task.n:
        return iter(DigitLists("train", task.n, run.batch, run.steps, run.seed))
    return classification_batches(run, task.random_labels)


@torch.no_grad()
def validate(model: nn.Module, n: int) -> float:
    """Percent right on validation images."""
    if not n:
        images, labels = digit_images("validation")
        return 100 * (model(images).argmax(-1) == labels).double().mean().item()
    lists = DigitLists("validation", n, batch_size=500, batches=4, seed=1, fixed=True)
    right = [(model(x).squeeze(-1).argsort(-1).argsort(-1) == ranks).all(-1) for x, ranks in lists]
    return 100 * torch.cat(right).double().mean().item()


def train(run: Run) -> dict:
    """Train once; what happened, as a row for the results."""
    start, task = time.perf_counter(), TASKS[run.task]
    torch.manual_seed(run.seed)
    model = nn.Sequential(
        *(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1 if task.n else 10)),
        *([nn.Flatten(-2)] if task.n else []),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=run.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, run.steps)
    hook = ARMS[run.arm]()
    finite = True
    for inputs, target in batches(run, task):
        outputs = model(inputs)
        finite = bool(outputs.isfinite().all())
        if not finite:
            break
        loss = task.loss(outputs, target)
        if hook is not None:
            loss = hook(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if run.schedule == "cosine":
            schedule.step()
    return {
        **asdict(run),
        "accuracy": validate(model, task.n),
        "finite": finite,
        "fallbacks": 0 if hook is None else int(hook.diagnostics()["fallbacks"]),
        "seconds": round(time.perf_counter() - start, 2),
        "newton_plugin": npl.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def read(path: Path) -> dict[Run, dict]:
    """The rows of a results file by their runs; the last one counts where a run is there twice."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {Run(**{name: row[name] for name in Run.__dataclass_fields__}): row for row in rows}


def difference(values: list[float], base: list[float]) -> str:
    """Mean of the paired differences and its 95 % interval (Student's t)."""
    each = [v - b for v, b in zip(values, base, strict=True)]
    half = student.ppf(0.975, len(each) - 1) * statistics.stdev(each) / len(each) ** 0.5
    mean = statistics.mean(each)
    return f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]"


def spread(values: list[float]) -> str:
    """Mean and standard deviation over the seeds."""
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def lines(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])


class Tables:
    """The tables of a results file. A column holds the seeds for which every one of its runs is there."""

    def __init__(self, done: dict[Run, dict], sections: dict[str, list[Run]]) -> None:
        self.done = done
        self.columns: dict[str, dict[tuple, list[float]]] = {}  # section -> (arm, rate, schedule) -> by seed
        self.seeds: dict[str, int] = {}
        self.used: set[Run] = set()
        for name, runs in sections.items():
            missing = {r.seed for r in runs if r not in done}
            present = [r for r in runs if r.seed not in missing]
            if len({r.seed for r in present}) < 2:
                continue
            self.used.update(present)
            column: dict[tuple, list[float]] = {}
            for r in present:
                column.setdefault((r.arm, r.learning_rate, r.schedule), []).append(done[r]["accuracy"])
            self.columns[name], self.seeds[name] = column, len({r.seed for r in present})

    def main(self) -> list[str]:
        """Arms by losses: accuracy, the difference to plain, the difference to the whole rule."""
        names = [name for name in TASKS if name in self.columns]
        of = {name: {arm: v for (arm, _, _), v in self.columns[name].items()} for name in names}
        titles = [f"* **{n}**: {TASKS[n].title}; Adam {TASKS[n].learning_rate:g}, {self.seeds[n]} seeds" for n in names]
        parts = [
            "\n".join(titles),
            "Accuracy on validation images, %: mean ± standard deviation over the seeds.",
            lines(["arm", *names], [[arm, *(spread(of[n][arm]) for n in names)] for arm in ARMS]),
        ]
        for base in ("plain", "Fisher auto"):
            rows = [[arm, *(difference(of[n][arm], of[n][base]) for n in names)] for arm in ARMS if arm != base]
            what = f"Difference to {base} in points, paired by seed, with its 95 % interval"
            parts += [f"{what} (not corrected for their number).", lines(["arm", *names], rows)]
        return parts

    def control(self) -> list[str]:
        """Learning rate and schedule on loss A."""
        if "control" not in self.columns:
            return []
        column = self.columns["control"]
        rows = []
        for rate in CONTROL_RATES:
            for schedule in ("cosine", "constant"):
                plain, ours = column["plain", rate, schedule], column["Fisher auto", rate, schedule]
                rows.append([f"{rate:g}", schedule, spread(plain), spread(ours), difference(ours, plain)])
        tops = {}
        for arm in ("plain", "Fisher auto"):
            tops[arm] = max((v for (a, _, _), v in column.items() if a == arm), key=statistics.mean)
        gap = difference(tops["Fisher auto"], tops["plain"])
        return [
            f"Loss A, {self.seeds['control']} seeds: how much of the gain is a learning-rate schedule?",
            lines(["learning rate", "schedule", "plain", "Fisher auto", "difference"], rows),
            f"Best of Fisher auto's six against the best of plain's six, chosen on these same seeds: {gap}.",
        ]

    def small_batch(self) -> list[str]:
        """Batches of four on loss E."""
        if "batch4" not in self.columns:
            return []
        column = {arm: v for (arm, _, _), v in self.columns["batch4"].items()}
        rows = [[arm, spread(v), difference(v, column["plain"]) if arm != "plain" else ""] for arm, v in column.items()]
        return [
            f"Loss E in batches of 4, {self.seeds['batch4']} seeds.",
            lines(["arm", "accuracy", "difference to plain"], rows),
        ]

    def remarks(self) -> list[str]:
        """What else the rows tell: runs that left the finite numbers, fallbacks, versions."""
        rows = [self.done[run] for run in self.used]
        versions = sorted({f"newton_plugin {r['newton_plugin']}, torch {r['torch']}" for r in rows})
        return [
            f"{len(rows)} runs; {sum(not r['finite'] for r in rows)} left the finite numbers; "
            f"{sum(r['fallbacks'] > 0 for r in rows)} had a batch that fell back to a simpler curvature. "
            f"{'; '.join(versions)}.",
        ]

    def __str__(self) -> str:
        made = "Made by `python -m benchmarks.auto_damping --table` from auto_damping.jsonl."
        return "\n\n".join([made, *self.main(), *self.control(), *self.small_batch(), *self.remarks()]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--only", nargs="+", choices=[*TASKS, "control", "batch4"], help="sections to train")
    parser.add_argument("--table", action="store_true", help="train nothing; print and write the tables")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = options.out / "auto_damping.jsonl"
    runs = sections(options.seeds, options.steps)
    if not options.table:
        options.out.mkdir(parents=True, exist_ok=True)
        for run in [r for name in options.only or runs for r in runs[name]]:
            if run not in read(path):
                row = train(run)
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{run}: {row['accuracy']:.2f} % in {row['seconds']:.0f} s", flush=True)
    text = str(Tables(read(path), runs))
    (options.out / "auto_damping.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
