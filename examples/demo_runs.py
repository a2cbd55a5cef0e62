"""How the demo trains: one network after the other in worker processes, with progress told on a queue."""

import logging
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from typing_extensions import override

from examples.demo_arms import Job
from examples.rank_digits import DigitRankingData, RankDigits, pl
from newton_plugin_lightning import NewtonLosses

EVALUATIONS = 10  # points of a validation curve
_QUEUE: Any = None  # where a worker process tells its progress


class Curve(pl.Callback):
    """Validation accuracy by step, and a sign of life every few steps."""

    def __init__(self, alive: Callable[[int], Any]) -> None:
        self.alive, self.told, self.points = alive, 0, []

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step - self.told >= 25 or trainer.global_step == trainer.max_steps:
            self.alive(trainer.global_step - self.told)
            self.told = trainer.global_step

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.points.append((trainer.global_step, float(trainer.callback_metrics["val/full"])))


def train(job: Job, alive: Callable[[int], Any] | None = None) -> dict[str, Any]:
    """Train one network; its validation curve, and its accuracy on the test images at the end."""
    setting, arm = job.setting, job.arm
    curve = Curve(alive or _tell)
    pl.seed_everything(job.seed, verbose=False)
    data = DigitRankingData(setting.n, steps=job.steps, seed=1000 + job.seed)
    model = RankDigits(arm.loss, setting.temperature, setting.learning_rate, job.steps)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=job.steps,
        val_check_interval=max(1, job.steps // EVALUATIONS),
        callbacks=[curve] if arm.newton is None else [curve, NewtonLosses(**arm.newton)],
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    begin = time.perf_counter()
    trainer.fit(model, data)
    seconds = time.perf_counter() - begin
    test = trainer.test(model, data, verbose=False)[0]
    result = {"setting": setting.title, "arm": arm.name, "seed": job.seed, "steps": job.steps}
    result |= {"full": test["test/full"], "elements": test["test/elements"], "seconds": seconds}
    return {**result, "validation": curve.points}


def _tell(steps: int) -> None:
    parent = multiprocessing.parent_process()
    if parent is None or not parent.is_alive():
        os._exit(1)  # nobody is waiting for this any more
    _QUEUE.put(steps)


def quiet(queue: Any = None) -> None:
    """Prepare a process for many small runs: one thread, and nothing printed into the progress bar."""
    global _QUEUE
    _QUEUE = queue
    torch.set_num_threads(1)
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # of Lightning with torch >= 2.11


def train_all(jobs: list[Job], workers: int, alive: Callable[[int], Any]) -> Iterator[dict[str, Any]]:
    """Train every job, ``workers`` at a time (1: in this process); results in the order of the jobs."""
    if workers == 1:
        quiet()
        yield from (train(job, alive) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    with ProcessPoolExecutor(workers, context, initializer=quiet, initargs=(queue,)) as pool:
        for future in [pool.submit(train, job) for job in jobs]:
            while not (future.done() and queue.empty()):
                if queue.empty():
                    time.sleep(0.05)
                else:
                    alive(queue.get())
            yield future.result()
