"""look: what a few plain steps of a training show about the loss, before anything is switched on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor

from newton_plugin._boundary.rows import RowLayout, check_feature_dims
from newton_plugin._doors.found import Found
from newton_plugin._doors.last_step import last_steps
from newton_plugin._doors.newton_loss import NewtonLoss
from newton_plugin._errors import ArgumentError, ArgumentTypeError, check_floating
from newton_plugin.testing._look_report import Cost, LookReport
from newton_plugin.testing._subject import own_copy
from newton_plugin.testing._watch import Watch
from newton_plugin.testing._watching import Watching

__all__ = ["look"]

_CHECKED = 64  # samples that check_loss gets


def look(
    loss_fn: Callable[..., Tensor],
    batches: Iterable[Sequence[Any]],
    *,
    reduction: Literal["mean", "sum"] = "mean",
    feature_dims: int | Sequence[int] | None = None,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    steps: int = 40,
    pairs: int = 15,
) -> LookReport:
    """Look at a few dozen steps of plain training; ``print`` the report that comes back.

    It says what is under the loss, what :func:`check_loss` finds on a real batch, the two numbers of "Look first"
    (docs/when-it-helps.md) and what the gated rule reads (docs/gated.md) over the steps, what the package would cost,
    and what to take.

    Args:
        loss_fn: a function or module that returns one number, or one for each sample.
        batches: for each step ``(outputs, *args)``, with which the loss is called. Let it be a generator that trains:
            what comes between two batches is yours. Outputs with their graph show the last layer, too; nothing of it is
            used up, and no ``grad`` is touched.
        reduction, feature_dims: as for :class:`newton_plugin.LossHook`.
        optimizer: that takes the steps; with SGD another rule is recommended than with Adam.
        steps: most batches that are taken.
        pairs: how often the loss and its gradient are timed, with the package and without; 0: never.

    Raises:
        ArgumentError: no batches; ``steps`` or ``pairs`` out of range.
        ArgumentTypeError: a batch that is no sequence, outputs that are no floating-point tensor.

    A loss that is a module is copied. torch's random state is put back after every evaluation.

    Example:
        >>> import torch
        >>> from newton_plugin.testing import look
        >>> generator = torch.Generator().manual_seed(0)
        >>> batches = [(torch.randn(32, 5, generator=generator), torch.arange(32) % 5) for _ in range(12)]
        >>> report = look(torch.nn.functional.cross_entropy, batches, pairs=0)
        >>> report.boundaries[0].samples, report.advice.take
        (32, 'default')
    """
    if not callable(loss_fn):
        raise ArgumentTypeError(f"loss_fn must be callable; got {type(loss_fn).__name__}.")
    for name, count, least in (("steps", steps, 1), ("pairs", pairs, 0)):
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            raise ArgumentError(f"{name} must be an integer of {least} or more; got {count!r}.")
    loss_fn = own_copy(loss_fn.loss_fn if isinstance(loss_fn, NewtonLoss) else loss_fn)
    rule: dict[str, Any] = {"reduction": reduction, "feature_dims": feature_dims, "sync": False}
    watching = NewtonLoss(loss_fn, curvature=Watching(), **rule)
    if optimizer is not None:
        watching.set_optimizer(optimizer)
    watch, batch = Watch(), None
    for batch in islice(batches, steps):
        outputs, args = _checked(batch)
        _gradient(watching, outputs, args)
        layout = RowLayout(tuple(outputs.shape), check_feature_dims(feature_dims))
        found = Found(["outputs"], [layout], watching._used).boundaries()
        watch.add(found, last_steps(["outputs"], watching._used))
    if batch is None:
        raise ArgumentError("batches must hold at least one batch, (outputs, *args); got none.")
    outputs, args = batch[0].detach(), tuple(batch[1:])
    cost = None
    if pairs:
        hooked = NewtonLoss(loss_fn, **rule)
        plainly, stepping = (partial(_gradient, f, outputs, args) for f in (loss_fn, hooked))
        cost = _cost_of(plainly, stepping, pairs, "the loss and its gradient", outputs)
    few = [_first(value, len(outputs)) for value in (outputs, *args)]
    watch.check("outputs", loss_fn, *few, reduction=reduction, feature_dims=feature_dims)
    return watch.report(cost, optimizer)


def _checked(batch: Any) -> tuple[Tensor, tuple[Any, ...]]:
    if not isinstance(batch, Sequence) or not batch:
        raise ArgumentTypeError(f"batches must hold sequences (outputs, *args); got {type(batch).__name__}.")
    check_floating("outputs", batch[0])
    return batch[0], tuple(batch[1:])


def _gradient(loss_fn: Callable[..., Tensor], outputs: Tensor, args: Sequence[Any]) -> None:
    """The loss and its gradient at the outputs, and nothing below; the random state is as before."""
    with torch.enable_grad(), _same_random_state(outputs):
        y = outputs if outputs.requires_grad else outputs.detach().requires_grad_()
        y = y.clone()  # a loss that works in place may not change a leaf
        torch.autograd.grad(loss_fn(y, *args).sum(), y)


@contextmanager
def _same_random_state(like: Tensor) -> Iterator[None]:
    with torch.random.fork_rng(devices=[like.device] if like.is_cuda else []):
        yield


def _first(value: Any, samples: int) -> Any:
    """The first samples of a tensor that has a row for each."""
    if isinstance(value, Tensor) and value.ndim and len(value) == samples:
        return value[:_CHECKED]
    return value


def _cost_of(
    plain: Callable[[], None], hooked: Callable[[], None], pairs: int, of: str, like: Tensor, warm_up: int = 3
) -> Cost:
    """Time two functions in turn, the second over the first.

    Args:
        plain, hooked: without and with the package.
        pairs: how often.
        of: what they do, in words.
        like: a tensor on the device that they use, which is waited for.
        warm_up: pairs that do not count.
    """
    times = [(_seconds(plain, like), _seconds(hooked, like)) for _ in range(warm_up + pairs)]
    return Cost.of_pairs(times[warm_up:], of, "the default")


def _seconds(run: Callable[[], None], like: Tensor) -> float:
    began = time.perf_counter()
    run()
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
    return time.perf_counter() - began
