"""Slow, dense, obvious float64 twins of everything clever in the core. Loops over samples on purpose."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def gradients_and_hessians(loss_of: Callable[[Tensor], Tensor], y: Tensor, mean: bool = True) -> tuple[Tensor, Tensor]:
    """g (N, m) and H (N, m, m) of the samples' own losses, from the full (N m, N m) Hessian of the batch's loss."""
    y = y.detach().clone().requires_grad_()
    n, m = y.shape[0], y[0].numel()
    scale = n if mean else 1
    (gradient,) = torch.autograd.grad(loss_of(y), y)
    full = torch.autograd.functional.hessian(loss_of, y).reshape(n, m, n, m)
    blocks = torch.stack([full[i, :, i, :] for i in range(n)])
    return gradient.reshape(n, m) * scale, blocks * scale


def power_solve(c: Tensor, damping: float, g: Tensor, power: float) -> Tensor:
    """``(C + d I)^-power g`` for one sample, with |eigenvalues| where C + d I is not positive definite."""
    values, vectors = torch.linalg.eigh(c)
    shifted = values + damping if float(values.min()) + damping > 0 else values.abs() + damping
    return vectors @ torch.diag(shifted**-power) @ vectors.T @ g


def step(g: Tensor, h: Tensor, curvature: str, structure: str, power: float, damping: float) -> Tensor:
    """The step of every sample by the definitions alone."""
    n, m = g.shape
    if curvature == "norm":
        mean = sum(float(g[i] @ g[i]) for i in range(n)) / n
        return torch.stack([g[i] / (g[i] @ g[i] + 0.1 * mean).sqrt() for i in range(n)])
    own = [h[i] if curvature == "hessian" else torch.outer(g[i], g[i]) for i in range(n)]
    average = sum(own) / n
    if structure == "mean":
        matrices = [average] * n
    elif structure == "per_sample":
        matrices = own
    else:
        matrices = [torch.eye(m, dtype=g.dtype) * (average.trace() / m)] * n
    return torch.stack([power_solve(matrices[i], damping, g[i], power) for i in range(n)])


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest entry."""
    scale = theirs.abs().max().clamp_min(1e-300)
    return float((ours - theirs).abs().max() / scale)
