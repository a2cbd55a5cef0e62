"""Confident learning, by cleanlab: what networks say of samples that they were not trained on."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from benchmarks.suspects.tasks import Data, Task
from benchmarks.suspects.training import EPOCHS, fit
from torch import Tensor

__all__ = ["FOLDS", "confident", "is_installed", "out_of_sample"]

FOLDS = 5


def is_installed() -> bool:
    """Whether cleanlab can be imported; it is no dependency of this package."""
    return importlib.util.find_spec("cleanlab") is not None


def out_of_sample(
    task: Task, data: Sequence[Data], seeds: Sequence[int], rates: Sequence[float], epochs: int = EPOCHS
) -> Tensor:
    """Probabilities (R, K, C) of every sample's classes, by networks that were trained on the other folds."""
    count = len(data[0].wrong)
    parts = [torch.randperm(count, generator=torch.Generator().manual_seed(seed + 2 * 10**6)) for seed in seeds]
    held = torch.stack(parts).reshape(len(seeds), FOLDS, -1)  # count is a multiple of FOLDS
    others = torch.stack([held[:, [k for k in range(FOLDS) if k != fold]].flatten(1) for fold in range(FOLDS)], 1)
    repeated = [d for d in data for _ in range(FOLDS)]
    each = [seed * FOLDS + fold for seed in seeds for fold in range(FOLDS)]
    members = others.flatten(0, 1)
    networks = fit(task, repeated, each, [r for r in rates for _ in range(FOLDS)], members=members, epochs=epochs)
    which = torch.arange(len(repeated)).unsqueeze(1)
    with torch.no_grad():
        inputs = torch.stack([d.inputs for d in repeated])[which, held.flatten(0, 1)]
        found = networks(inputs).softmax(-1).unflatten(0, (len(seeds), FOLDS)).flatten(1, 2)
    place = held.flatten(1).unsqueeze(-1).expand(found.shape)
    return torch.zeros_like(found).scatter(1, place, found)


def confident(labels: Tensor, probabilities: Tensor) -> dict[str, Tensor]:
    """cleanlab's scores of labels (K,) by probabilities (K, C): (K,) each, higher is more suspect.

    ``adjusted``: the classes' mean confidences, the thresholds of confident learning, are taken off first.
    """
    from cleanlab.rank import get_label_quality_scores  # pyright: ignore[reportMissingImports]

    p = probabilities.double()
    p = (p / p.sum(-1, keepdim=True)).numpy()
    found = {}
    for method in ("self_confidence", "normalized_margin"):
        for adjusted in (False, True):
            quality = get_label_quality_scores(labels.numpy(), p, method=method, adjust_pred_probs=adjusted)
            name = f"confident learning: {method.replace('_', ' ')}{', adjusted' if adjusted else ''}"
            found[name] = -torch.as_tensor(quality)
    return found
