"""Whether ``torch.func`` can differentiate a loss. The package does not use it; a user who composes transforms does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from newton_plugin.testing._behaviour import relative
from newton_plugin.testing._differences import CannotMove, hessian_error, tolerance
from newton_plugin.testing._reasons import first_line, in_plain_words
from newton_plugin.testing._report import Finding, skipped
from newton_plugin.testing._subject import Subject

__all__ = ["by_func_gradient", "by_func_hessian", "by_func_per_sample"]

_MOST_OUTPUTS = 1024  # numbers in the outputs of the batch: torch.func.hessian has the square of that


def _failure(error: Exception) -> Finding:
    words, remedy = in_plain_words(error)
    return Finding("fails", "fails", words, remedy, first_line(error))


def _agreement(ours: Tensor, theirs: Tensor | None, words: str = "") -> Finding:
    if theirs is None:
        return Finding("ok", "works", words)
    error = relative(ours, theirs)
    if error <= tolerance(ours.dtype):
        return Finding("ok", "exact", words, number=error)
    return Finding("fails", "wrong", f"differs from autograd's by {error:.0e} relative. {words}".rstrip(), number=error)


def by_func_gradient(subject: Subject, gradient: Tensor | None) -> Finding:
    """``torch.func.grad`` of the batch's loss."""
    try:
        ours = torch.func.grad(subject.total)(subject.outputs.clone())
    except Exception as error:
        return _failure(error)
    if gradient is None and not bool(ours.any()):
        return Finding("fails", "missing", "it gives zeros, without an error", "see the gradient by autograd")
    return _agreement(ours, gradient)


def by_func_hessian(subject: Subject, products: Tensor | None, probes: Tensor, trusted: bool) -> Finding:
    """``torch.func.hessian`` of the batch's loss, along ``probes``.

    Forward over reverse, as ``hessian`` goes; reverse over reverse where an operation has no forward mode. Compared
    with the products by double backward, or with differences where those are not ``trusted``.
    """
    size = subject.outputs.numel()
    if size > _MOST_OUTPUTS:
        return skipped(f"{size} x {size} entries; pass a smaller batch to try it")

    def times(full: Tensor) -> Tensor:
        return torch.einsum("ij,kj->ki", full.reshape(size, size), probes.reshape(len(probes), size)).view_as(probes)

    def judged(full: Tensor, words: str = "") -> Finding:
        if trusted or products is None:
            return _agreement(times(full), products, words)
        return _against_differences(subject, times(full), words)

    try:
        return judged(torch.func.hessian(subject.total)(subject.outputs.clone()))
    except Exception as error:
        forward = error
    why, _ = in_plain_words(forward)
    try:
        full = torch.func.jacrev(torch.func.jacrev(subject.total))(subject.outputs.clone())
    except Exception as error:
        return _failure(error)
    found = judged(full, f"by jacrev(jacrev(loss)); not by torch.func.hessian: {why}")
    return Finding("note" if found.ok else found.status, found.verdict, found.words, "", first_line(forward))


def _against_differences(subject: Subject, ours: Tensor, words: str) -> Finding:
    try:
        error = hessian_error(subject, ours)
    except CannotMove:
        return _agreement(ours, None, words)
    if error <= tolerance(ours.dtype):
        return Finding("ok", "exact", words, number=error)
    return Finding("fails", "wrong", f"differs from how the gradient changes by {error:.0e} relative", number=error)


def by_func_per_sample(subject: Subject, blocks: Tensor | None) -> Finding:
    """``vmap(hessian(loss of one sample))``; an argument of N entries is taken to hold one for each sample."""
    n, layout = subject.layout.rows, subject.layout
    if layout.shape[0] != n:
        return skipped("feature_dims makes several samples of one row")
    if subject.outputs.numel() > _MOST_OUTPUTS:
        return skipped(f"{subject.outputs.numel()} outputs; pass a smaller batch to try it")
    if any(isinstance(a, Tensor) for a in subject.kwargs.values()):
        return skipped("tensors are passed by keyword; pass them by position to try it")
    if any(_holds_samples(a, n) for a in subject.args):
        return skipped("an argument holds several tensors; pass them by position to try it")
    split = [isinstance(a, Tensor) and a.ndim > 0 and len(a) == n for a in subject.args]

    def one(y: Tensor, *args: Any) -> Tensor:
        rows = [a.unsqueeze(0) if own else a for a, own in zip(args, split, strict=True)]
        with subject.seeded():
            loss = subject.loss_fn(y.unsqueeze(0), *rows, **subject.kwargs)
        return loss.reshape(())

    in_dims = (0, *(0 if own else None for own in split))
    last: Exception | None = None
    for hessian in (torch.func.hessian(one), torch.func.jacrev(torch.func.jacrev(one))):
        try:
            ours = torch.func.vmap(hessian, in_dims)(subject.outputs.clone(), *subject.args)
        except Exception as error:
            last = error
            continue
        return _compared(ours.detach().reshape(n, layout.features, layout.features), blocks)
    assert last is not None
    return _failure(last)


def _holds_samples(value: Any, n: int) -> bool:
    """Whether a list or a dict has a tensor with a row for each sample."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return any(_holds_samples(v, n) or (isinstance(v, Tensor) and v.ndim > 0 and len(v) == n) for v in inside)


def _compared(ours: Tensor, blocks: Tensor | None) -> Finding:
    if blocks is None:
        return Finding("note", "works", "what it gives was not compared: no Hessian to compare with")
    found = _agreement(ours, blocks)
    if found.ok:
        return found
    return Finding(
        "note",
        "another loss",
        f"it runs, and differs from the batch's Hessian by {found.number:.1e} relative: this loss of a batch is not "
        "the mean of its losses of single samples (class weights, ignore_index, coupled samples)",
        "take the whole batch's loss, as the plugin does",
        number=found.number,
    )
