"""What a look leaves as it was: random states, and what Lightning says."""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from newton_plugin_lightning._bases import TREES

__all__ = ["quiet", "random_states_kept"]


@contextmanager
def random_states_kept(loaders: Iterable[Any] = ()) -> Iterator[None]:
    """Of Python, NumPy, torch and all its devices, and the generators of these loaders."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    generators = [(g, g.get_state()) for loader in loaders for g in _generators(loader)]
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            for generator, state in generators:
                generator.set_state(state)


def _generators(loader: Any) -> Iterator[torch.Generator]:
    for holder in (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
        found = getattr(holder, "generator", None)
        if isinstance(found, torch.Generator):
            yield found


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, Lightning says nothing about a Trainer that is none of the user's."""
    loggers = [logging.getLogger(name) for name in (*TREES, "lightning_fabric", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning)\.")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
