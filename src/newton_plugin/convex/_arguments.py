"""The arguments of solve_qp: checked, in float64, and brought to the form of ``_problem``."""

from __future__ import annotations

import torch
from torch import Tensor

from newton_plugin._errors import ArgumentError, ArgumentTypeError, ShapeError, check_choice, check_floating
from newton_plugin.convex._products import round_up

__all__ = ["batch_shape", "check_data", "check_options", "check_pairs", "flat_matrix", "flat_vector", "standard_form"]

_UNBOUNDED = 1e300  # stands for h = +inf, which would make NaNs in products


def check_options(reg: float, refine: bool | str, on_failure: str) -> None:
    if isinstance(reg, bool) or not isinstance(reg, (int, float)):
        raise ArgumentTypeError(f"reg must be a number >= 0; got {reg!r} of type {type(reg).__name__}.")
    if not 0 <= reg < float("inf"):
        raise ArgumentError(f"reg must be finite and >= 0; got {reg!r}. For a linear program try 1e-6.")
    check_choice("refine", refine, ("auto", True, False))
    check_choice("on_failure", on_failure, ("raise", "nan", "warn"))


def check_data(
    Q: Tensor, p: Tensor, A: Tensor | None, b: Tensor | None, G: Tensor | None, h: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, torch.dtype]:
    """The data in float64, absent constraints as no rows; and the dtype of the result."""
    check_floating("Q", Q)
    check_pairs(p, A, b, G, h)
    n = p.shape[-1]
    _check_shape("Q", Q, (n, n), "p")
    for matrix, vector, names in ((A, b, "Ab"), (G, h, "Gh")):
        if matrix is not None and vector is not None:
            _check_shape(names[0], matrix, (vector.shape[-1], n), f"{names[1]} and p")
    given = [t for t in (Q, p, A, b, G, h) if t is not None]
    if any(t.device != p.device for t in given):
        raise ArgumentError(
            f"all arguments must be on one device; got {', '.join(sorted({str(t.device) for t in given}))}."
        )
    dtype = p.dtype
    for t in given:
        if t.dtype != dtype:
            dtype = torch.promote_types(dtype, t.dtype)
    work = torch.float32 if p.device.type == "mps" else torch.float64
    if A is None or b is None:
        A, b = p.new_zeros(0, n, dtype=work), p.new_zeros(0, dtype=work)
    if G is None or h is None:
        G, h = p.new_zeros(0, n, dtype=work), p.new_zeros(0, dtype=work)
    Q, p, A, b, G, h = (t if t.dtype == work else t.to(work) for t in (Q, p, A, b, G, h))
    return Q, p, A, b, G, h, dtype


def check_pairs(p: Tensor, A: Tensor | None, b: Tensor | None, G: Tensor | None, h: Tensor | None) -> None:
    check_floating("p", p)
    if p.ndim == 0 or p.shape[-1] == 0:
        raise ShapeError(f"p must have shape (..., n), n >= 1; got {tuple(p.shape)}.")
    for matrix, vector, names in ((A, b, "Ab"), (G, h, "Gh")):
        if (matrix is None) != (vector is None):
            given, missing = names if vector is None else names[::-1]
            raise ArgumentError(f"{given} was given without {missing}. Give both, or neither.")
        if matrix is not None and vector is not None:
            check_floating(names[0], matrix)
            check_floating(names[1], vector)
            if vector.ndim == 0:
                raise ShapeError(f"{names[1]} must have shape (..., rows); got a scalar. One row is {names[1]}[None].")


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, int], source: str) -> None:
    if tuple(tensor.shape[-2:]) != expected:
        raise ShapeError(
            f"{name} must have shape (..., {expected[0]}, {expected[1]}) to fit {source}; got {tuple(tensor.shape)}."
        )


def batch_shape(Q: Tensor, p: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor) -> torch.Size:
    """The leading dimensions of all six together."""
    lead = [t.shape[:-2] for t in (Q, A, G)] + [t.shape[:-1] for t in (p, b, h)]
    several = {shape for shape in lead if shape}
    if len(several) <= 1:  # the usual case; broadcast_shapes takes a tenth of a small problem's time
        return several.pop() if several else torch.Size()
    try:
        return torch.broadcast_shapes(*several)
    except RuntimeError:
        listed = ", ".join(f"{name} {tuple(t.shape)}" for name, t in zip("QpAbGh", (Q, p, A, b, G, h), strict=True))
        raise ShapeError(
            f"the leading batch dimensions do not broadcast: {listed}. Shared data have no batch dimension."
        ) from None


def flat_matrix(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Shared matrices stay (r, n), others become (B, r, n)."""
    if tensor.ndim == 2:
        return tensor
    return tensor.expand(*shape, *tensor.shape[-2:]).reshape(shape.numel(), *tensor.shape[-2:])


def flat_vector(tensor: Tensor, shape: torch.Size) -> Tensor:
    return tensor.expand(*shape, tensor.shape[-1]).reshape(shape.numel(), tensor.shape[-1])


def _stack_rows(
    A: Tensor, b: Tensor, G: Tensor, h: Tensor, n: int, rows: int, shape: torch.Size
) -> tuple[Tensor, Tensor]:
    """C (K, n) or (B, K, n) and c (B, K), with rows ``0 x <= 1`` up to a multiple of 8."""
    matrices = [flat_matrix(t, shape) for t in (A, G) if t.shape[-2]]
    batch = shape.numel()
    if any(t.ndim == 3 for t in matrices):
        matrices = [t.expand(batch, *t.shape[-2:]) for t in matrices]
    columns = A.shape[-1]
    missing = rows - A.shape[-2] - G.shape[-2]
    if missing:
        lead = matrices[0].shape[:-2] if matrices else ()
        matrices.append(A.new_zeros(*lead, missing, columns))
    C = matrices[0] if len(matrices) == 1 else torch.cat(matrices, -2) if matrices else A
    if columns != n:
        C = torch.nn.functional.pad(C, (0, n - columns))
    h = h.clamp(-_UNBOUNDED, _UNBOUNDED)
    c = torch.cat((flat_vector(b, shape), flat_vector(h, shape), b.new_ones(batch, missing)), -1)
    return C, c


def standard_form(
    Q: Tensor, p: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor, shape: torch.Size
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Q, p, C, c of ``_problem``: an even number of variables, and rows up to a multiple of 8 (see ``_products``).

    The variable that is one too many is minimised by itself, at 0.
    """
    n = p.shape[-1]
    even, rows = round_up(n, 2), round_up(max(b.shape[-1] + h.shape[-1], 1), 8)
    if even != n:
        Q = torch.nn.functional.pad(Q, (0, 1, 0, 1))
        last = torch.zeros_like(Q[..., 0, :])
        last[..., -1] = 1.0
        Q = Q + torch.diag_embed(last)
        p = torch.nn.functional.pad(p, (0, 1))
    C, c = _stack_rows(A, b, G, h, even, rows, shape)
    return flat_matrix(Q, shape), flat_vector(p, shape), C, c
