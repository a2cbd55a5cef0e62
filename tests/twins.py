"""Slow, dense, obvious float64 twins of everything clever in the core. Loops over samples on purpose."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def gradients_and_hessians(loss_of: Callable[[Tensor], Tensor], y: Tensor, mean: bool = True) -> tuple[Tensor, Tensor]:
    """g (N, m) and H (N, m, m) of the samples' own losses, from the full (N m, N m) Hessian of the batch's loss.

    A mean is one over the samples that have a gradient: the loss ignores the others.
    """
    y = y.detach().clone().requires_grad_()
    n, m = y.shape[0], y[0].numel()
    (gradient,) = torch.autograd.grad(loss_of(y), y)
    scale = live_samples(gradient) if mean else 1
    full = torch.autograd.functional.hessian(loss_of, y).reshape(n, m, n, m)
    blocks = torch.stack([full[i, :, i, :] for i in range(n)])
    return gradient.reshape(n, m) * scale, blocks * scale


def live_samples(g: Tensor) -> int:
    """How many samples have a gradient; all if none has one."""
    return sum(bool(row.any()) for row in g) or len(g)


def power_solve(c: Tensor, damping: float, g: Tensor, power: float) -> Tensor:
    """``(C + d I)^-power g`` for one sample, with |eigenvalues| where C + d I is not positive definite."""
    values, vectors = torch.linalg.eigh(c)
    shifted = values + damping if float(values.min()) + damping > 0 else values.abs() + damping
    return vectors @ torch.diag(shifted**-power) @ vectors.T @ g


def step(
    g: Tensor, h: Tensor, curvature: str, structure: str, power: float, damping: float, live: int | None = None
) -> Tensor:
    """The step of every sample by the definitions alone; ``live`` of the samples count in a mean, all if None."""
    n, m = g.shape
    count = n if live is None else live
    if curvature == "norm":
        mean = sum(float(g[i] @ g[i]) for i in range(n)) / count
        return torch.stack([g[i] / (g[i] @ g[i] + 0.1 * mean).sqrt() for i in range(n)])
    own = [h[i] if curvature == "hessian" else torch.outer(g[i], g[i]) for i in range(n)]
    average = sum(own) / count
    if structure == "mean":
        matrices = [average] * n
    elif structure == "per_sample":
        matrices = own
    else:
        matrices = [torch.eye(m, dtype=g.dtype) * (average.trace() / m)] * n
    return torch.stack([power_solve(matrices[i], damping, g[i], power) for i in range(n)])


def in_one_size(gradients: list[Tensor], steps: list[Tensor], power: float) -> tuple[list[Tensor], float]:
    """The steps at all boundaries of a rule with a relative damping, in the one size of their loss; and the size."""
    gains = [float((g * s).sum() / g.square().sum()) for g, s in zip(gradients, steps, strict=True)]
    m = [s.shape[1] for s in steps]
    size = (sum(k * gain ** (-1 / power) for k, gain in zip(m, gains, strict=True)) / sum(m)) ** -power
    return [s * (size / gain) for s, gain in zip(steps, gains, strict=True)], size


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest entry."""
    scale = theirs.abs().max().clamp_min(1e-300)
    return float((ours - theirs).abs().max() / scale)
