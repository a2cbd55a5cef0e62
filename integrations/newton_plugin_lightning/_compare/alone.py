"""What one training must not change for the next, nor for the program around it."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import sys
from collections.abc import Iterator

import numpy as np
import torch

from newton_plugin_lightning._bases import TREES

__all__ = ["alone"]

_SEEDS = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")  # set by seed_everything


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """One thread, Lightning's loggers quiet, no arguments of ours for its CLI; all is put back, the seeds too."""
    threads, arguments = torch.get_num_threads(), sys.argv
    environment = {name: os.environ.get(name) for name in _SEEDS}
    loggers = [logging.getLogger(name) for name in (*TREES, "lightning_fabric", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    torch.set_num_threads(1)
    sys.argv = arguments[:1]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        sys.argv = arguments
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
