r"""Damped symmetric solves, batched: ``(C + d I)^-p g`` for every curvature of the package.

Four ways to the same vector:

* **Cholesky**, for C known to be positive semi-definite (Fisher): :func:`solve_definite`.
* **Cholesky, repaired.** A Hessian may be indefinite. Where ``C + d I`` is not positive definite, a plain
  solve walks uphill along the negative directions. There the eigenvalues are replaced by their absolute
  value, ``C = Q diag(l) Q'  ->  Q diag(|l| + d) Q'``, so that the step is a descent direction for every
  d > 0 (saddle-free Newton): :func:`solve_indefinite`.
* **Spectral**, for the fractional power p = 1/2: :func:`solve_power`.
* **Push-through**, for Fisher matrices of fewer samples than features, never forming the m x m matrix:
  ``(G'G/N + d I)^-1 G' = G' (GG'/N + d I)^-1`` costs N x N: :func:`solve_push_through`.

Shapes: C is (m, m), one matrix for the batch, or (N, m, m), one for each sample; g is (N, m).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "eigenvalue_scale",
    "finite_or_identity",
    "solve_definite",
    "solve_indefinite",
    "solve_power",
    "solve_push_through",
    "working_dtype",
]


def working_dtype(device: torch.device) -> torch.dtype:
    """float64 wherever the device has it: an all-float32 Fisher loses the small eigenvalues."""
    return torch.float32 if device.type == "mps" else torch.float64


def finite_or_identity(matrix: Tensor) -> Tensor:
    """``matrix``, or the identity if it holds a NaN or an infinity (decompositions raise on those)."""
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.where(torch.isfinite(matrix).all(), matrix, eye)


def eigenvalue_scale(matrix: Tensor) -> Tensor:
    """Root-mean-square eigenvalue of a symmetric matrix, ``||C||_F / sqrt(m)``: (..., m, m) -> (...).

    For ``C = c I`` it is ``|c|``, like ``tr|C| / m``, to which it is never smaller; it needs no
    decomposition and does not cancel where C is indefinite.
    """
    return torch.linalg.matrix_norm(matrix) / matrix.shape[-1] ** 0.5


def _shifted(matrix: Tensor, damping: Tensor) -> Tensor:
    shifted = matrix.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(damping.unsqueeze(-1) if damping.ndim else damping)
    return shifted


def _apply(solve_factor: Tensor, gradient: Tensor) -> Tensor:
    """Cholesky factor (m, m) or (N, m, m) against rows (N, m)."""
    if solve_factor.ndim == 2:
        return torch.cholesky_solve(gradient.mT, solve_factor).mT
    return torch.cholesky_solve(gradient.unsqueeze(-1), solve_factor).squeeze(-1)


def solve_definite(matrix: Tensor, damping: Tensor, gradient: Tensor) -> Tensor:
    """``(C + d I)^-1 g`` for a positive semi-definite C, without a host synchronisation.

    A factorisation that fails (damping far below rounding) gives NaN, which the caller turns into
    "gradient kept, counted" or an error; see :class:`newton_plugin._rule.StepRule`.
    """
    factor, info = torch.linalg.cholesky_ex(_shifted(matrix, damping))
    solved = _apply(factor, gradient)
    failed = info > 0 if info.ndim == 0 else (info > 0).unsqueeze(-1)
    return torch.where(failed, torch.nan, solved)


def solve_indefinite(matrix: Tensor, damping: Tensor, gradient: Tensor) -> Tensor:
    """``(C + d I)^-1 g``; with ``|eigenvalues| + d`` for the matrices whose Cholesky fails.

    On an accelerator it costs one host synchronisation (did any factorisation fail?), far less than
    an eigendecomposition of everything.
    """
    factor, info = torch.linalg.cholesky_ex(_shifted(matrix, damping))
    failed = info > 0
    if not bool(failed.any()):
        return _apply(factor, gradient)
    if matrix.ndim == 2:
        return _spectral(matrix, damping, gradient, 1.0)
    solved = _apply(torch.where(failed[:, None, None], torch.eye(matrix.shape[-1]).to(factor), factor), gradient)
    shift = damping[failed] if damping.ndim else damping
    solved[failed] = _spectral(matrix[failed], shift, gradient[failed], 1.0)
    return solved


def solve_power(matrix: Tensor, damping: Tensor, gradient: Tensor, power: float) -> Tensor:
    """``(C + d I)^-power g`` through the eigenvalues, repaired as in :func:`solve_indefinite`."""
    return _spectral(matrix, damping, gradient, power)


def _spectral(matrix: Tensor, damping: Tensor, gradient: Tensor, power: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    shift = damping.unsqueeze(-1) if damping.ndim else damping
    definite = (values[..., :1] + shift) > 0  # eigh sorts: the first eigenvalue decides
    scaled = torch.where(definite, values + shift, values.abs() + shift).pow(-power)
    if matrix.ndim == 2:
        return ((gradient @ vectors) * scaled) @ vectors.mT
    rotated = (vectors.mT @ gradient.unsqueeze(-1)).squeeze(-1) * scaled
    return (vectors @ rotated.unsqueeze(-1)).squeeze(-1)


def solve_push_through(rows: Tensor, gram: Tensor, damping: Tensor, power: float) -> Tensor:
    """``(w G'G + d I)^-power`` applied to the rows of G themselves, in N x N.

    ``G'G`` and ``GG' = U diag(s) U'`` share their non-zero eigenvalues, so
    ``G (w G'G + d I)^-p = U diag((w s + d)^-p) U' G``.

    Args:
        rows: G, (N, m) with N < m.
        gram: ``w GG'``, (N, N), w = 1/N for the batch mean.
        damping: d > 0, no dimensions.
        power: 1 or 0.5.
    """
    if power == 1:
        factor, info = torch.linalg.cholesky_ex(_shifted(gram, damping))
        return torch.where(info > 0, torch.nan, torch.cholesky_solve(rows, factor))
    values, vectors = torch.linalg.eigh(gram)
    scaled = (values.clamp_min(0) + damping).pow(-power)
    return vectors @ (scaled.unsqueeze(-1) * (vectors.mT @ rows))
