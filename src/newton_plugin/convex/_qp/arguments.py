"""The arguments of solve_qp: checked, converted to float64, and absent constraints replaced by no rows."""

from __future__ import annotations

import torch
from torch import Tensor

from newton_plugin._errors import ArgumentError, ArgumentTypeError, ShapeError, check_choice, check_floating

__all__ = [
    "check_data",
    "check_options",
    "check_pairs",
]


def check_options(reg: float, refine: bool | str, on_failure: str) -> None:
    if isinstance(reg, bool) or not isinstance(reg, (int, float)):
        raise ArgumentTypeError(f"reg must be a number >= 0; got {reg!r} of type {type(reg).__name__}.")
    if not 0 <= reg < float("inf"):
        raise ArgumentError(f"reg must be finite and >= 0; got {reg!r}. For a linear program try 1e-6.")
    check_choice("refine", refine, ("auto", True, False))
    check_choice("on_failure", on_failure, ("raise", "nan", "warn"))


def check_data(
    Q: Tensor, p: Tensor, A: Tensor | None, b: Tensor | None, G: Tensor | None, h: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, torch.dtype, float]:
    """The data in float64, absent constraints as no rows; the dtype of the result, and the rounding error of the rows.

    The last is that of the coarsest dtype among A, b, G and h.
    """
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
    rows = [torch.finfo(t.dtype).eps for t in (A, b, G, h) if t is not None]
    precision = max(rows, default=torch.finfo(dtype).eps)
    work = torch.float32 if p.device.type == "mps" else torch.float64
    if A is None or b is None:
        A, b = p.new_zeros(0, n, dtype=work), p.new_zeros(0, dtype=work)
    if G is None or h is None:
        G, h = p.new_zeros(0, n, dtype=work), p.new_zeros(0, dtype=work)
    Q, p, A, b, G, h = (t if t.dtype == work else t.to(work) for t in (Q, p, A, b, G, h))
    return Q, p, A, b, G, h, dtype, precision


def check_pairs(p: Tensor, A: Tensor | None, b: Tensor | None, G: Tensor | None, h: Tensor | None) -> None:
    check_floating("p", p)
    for name, sparse in (("p", p), ("b", b), ("h", h)):
        if isinstance(sparse, Tensor) and sparse.layout != torch.strided:
            raise ArgumentTypeError(f"{name} must be dense; got layout {sparse.layout}. Convert it: {name}.to_dense().")
    if p.ndim == 0 or p.shape[-1] == 0:
        raise ShapeError(f"p must have shape (..., n), n >= 1; got {tuple(p.shape)}.")
    for matrix, vector, names in ((A, b, "Ab"), (G, h, "Gh")):
        if (matrix is None) != (vector is None):
            given, missing = names if vector is None else names[::-1]
            raise ArgumentError(f"{given} was given without {missing}. Give both, or neither.")
        if matrix is not None and vector is not None:
            check_floating(names[0], matrix)
            check_floating(names[1], vector)
            if matrix.ndim == 1 and not matrix.numel():
                raise ShapeError(
                    f"{names[0]} must have shape (..., rows, {p.shape[-1]}); got an empty tensor of shape (0,). "
                    f"For no constraints of this kind pass None for {names[0]} and {names[1]}, or leave them out."
                )
            if vector.ndim == 0:
                raise ShapeError(f"{names[1]} must have shape (..., rows); got a scalar. One row is {names[1]}[None].")


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, int], source: str) -> None:
    if tuple(tensor.shape[-2:]) != expected:
        raise ShapeError(
            f"{name} must have shape (..., {expected[0]}, {expected[1]}) to fit {source}; got {tuple(tensor.shape)}."
        )
