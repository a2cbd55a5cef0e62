r"""Damped symmetric solves, batched: ``(C + d I)^-p g`` for every curvature of the package.

Four ways to the same vector:

* **Cholesky**, for C known to be positive semi-definite (Fisher): :func:`definite_inverse`.
* **Cholesky, repaired.** A Hessian may be indefinite. Where ``C + d I`` is not positive definite, a plain
  solve walks uphill along the negative directions. There the eigenvalues are replaced by their absolute
  value, ``C = Q diag(l) Q'  ->  Q diag(|l| + d) Q'``, so that the step is a descent direction for every
  d > 0 (saddle-free Newton): :func:`repaired_inverse`.
* **Spectral**, for the fractional power p = 1/2: :func:`spectral_inverse`.
* **Push-through**, for Fisher matrices of fewer samples than features, never forming the m x m matrix:
  ``(G'G/N + d I)^-1 G' = G' (GG'/N + d I)^-1`` costs N x N: :func:`push_through`.

The first three factorise C and return a function of g. A C that serves several steps is thus factorised once.

Shapes: C is (..., m, m) and d (...) or without dimensions; g is (..., N, m), rows for each matrix, or (..., m),
one row for each matrix.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from newton_plugin._runtime.transforms import readable

__all__ = [
    "HALF",
    "Inverse",
    "definite_inverse",
    "eigenvalue_scale",
    "finite_or_identity",
    "identity_rows",
    "push_through",
    "repaired_inverse",
    "shifted_eigenvalues",
    "spectral_inverse",
    "working_dtype",
]

Inverse = Callable[[Tensor], Tensor]
"""Gradients to steps."""

HALF = (torch.float16, torch.bfloat16)


def working_dtype(device: torch.device) -> torch.dtype:
    """float64 wherever the device has it: an all-float32 Fisher loses the small eigenvalues."""
    return torch.float32 if device.type == "mps" else torch.float64


def finite_or_identity(matrix: Tensor) -> Tensor:
    """``matrix``, or the identity if it holds a NaN or an infinity (decompositions raise on those)."""
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.where(torch.isfinite(matrix).all(), matrix, eye)


def identity_rows(like: Tensor) -> Tensor:
    """The identity, (m, m), in dtype and device of rows (..., m)."""
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def eigenvalue_scale(matrix: Tensor) -> Tensor:
    """Root-mean-square eigenvalue of a symmetric matrix, ``||C||_F / sqrt(m)``: (..., m, m) -> (...).

    For ``C = c I`` it is ``|c|``, as ``tr|C| / m`` is, and it is never smaller than that. It needs no decomposition and
    does not cancel where C is indefinite.
    """
    return torch.linalg.matrix_norm(matrix) / matrix.shape[-1] ** 0.5


def shifted_eigenvalues(values: Tensor, damping: Tensor) -> Tensor:
    """``l + d`` if that is positive for all eigenvalues l of a matrix (..., m), else ``|l| + d``; d broadcasts."""
    definite = values.amin(-1, keepdim=True) + damping > 0
    return torch.where(definite, values, values.abs()) + damping


def _shifted(matrix: Tensor, damping: Tensor) -> Tensor:
    # Out of place: torch.func.linearize drops an operation whose result nobody uses.
    diagonal = matrix.diagonal(dim1=-2, dim2=-1) + (damping.unsqueeze(-1) if damping.ndim else damping)
    return torch.diagonal_scatter(matrix, diagonal, dim1=-2, dim2=-1)


def _by_rows(solve: Inverse, ndim: int) -> Inverse:
    """``solve`` takes rows (..., N, m); also take one row for each matrix, (..., m)."""
    return lambda g: solve(g) if g.ndim == ndim else solve(g.unsqueeze(-2)).squeeze(-2)


def _by_factor(factor: Tensor) -> Inverse:
    return _by_rows(lambda g: torch.cholesky_solve(g.mT, factor).mT, factor.ndim)


def definite_inverse(matrix: Tensor, damping: Tensor) -> Inverse:
    """``(C + d I)^-1`` for a positive semi-definite C, without a host synchronisation.

    A factorisation that fails (damping far below rounding) gives NaN, which the caller turns into
    "gradient kept, counted" or an error; see :class:`newton_plugin._step.rule.StepRule`.
    """
    factor, info = torch.linalg.cholesky_ex(_shifted(matrix, damping))
    failed = info > 0
    return _by_factor(factor.masked_fill(failed[..., None, None] if failed.ndim else failed, torch.nan))


def repaired_inverse(matrix: Tensor, damping: Tensor) -> Inverse:
    """``(C + d I)^-1``; with ``|eigenvalues| + d`` for the matrices whose Cholesky fails.

    On an accelerator it costs one host synchronisation (did any factorisation fail?), far less than
    an eigendecomposition of everything. Under ``vmap`` and ``torch.compile`` nobody can ask, and everything is
    decomposed.
    """
    if not readable(matrix):
        return spectral_inverse(matrix, damping, 1.0)
    factor, info = torch.linalg.cholesky_ex(_shifted(matrix, damping))
    if not bool(info.any() if info.ndim else info):
        return _by_factor(factor)
    failed = info > 0
    if matrix.ndim == 2:
        return spectral_inverse(matrix, damping, 1.0)
    rest = _by_factor(torch.where(failed[..., None, None], identity_rows(matrix), factor))
    repaired = spectral_inverse(matrix[failed], damping[failed] if damping.ndim else damping, 1.0)

    def solve(g: Tensor) -> Tensor:
        solved = rest(g)
        solved[failed] = repaired(g[failed])
        return solved

    return solve


def spectral_inverse(matrix: Tensor, damping: Tensor, power: float) -> Inverse:
    """``(C + d I)^-power`` through the eigenvalues, repaired as in :func:`repaired_inverse`."""
    values, vectors = torch.linalg.eigh(matrix)
    scaled = shifted_eigenvalues(values, damping.unsqueeze(-1) if damping.ndim else damping).pow(-power).unsqueeze(-2)
    return _by_rows(lambda g: ((g @ vectors) * scaled) @ vectors.mT, matrix.ndim)


def push_through(gram: Tensor, damping: Tensor, power: float) -> Tensor:
    """A (N, N) with ``A G = G (w G'G + d I)^-power``, the inverse of an m x m matrix applied to the rows of G in N x N.

    ``G'G`` and ``GG' = U diag(s) U'`` share their non-zero eigenvalues, so
    ``G (w G'G + d I)^-p = U diag((w s + d)^-p) U' G``.

    Args:
        gram: ``w GG'``, (N, N), w = 1/N for the batch mean.
        damping: d > 0, no dimensions.
        power: 1 or 0.5.
    """
    if power == 1:
        factor, info = torch.linalg.cholesky_ex(_shifted(gram, damping))
        # An inverse, and not a solve for each of many columns: a product is twice as fast, and no less accurate where
        # the inverse is from a Cholesky factor (its residual is at most the condition number times rounding).
        return torch.cholesky_inverse(factor).masked_fill(info > 0, torch.nan)
    values, vectors = torch.linalg.eigh(gram)
    return (vectors * (values.clamp_min(0) + damping).pow(-power)) @ vectors.mT
