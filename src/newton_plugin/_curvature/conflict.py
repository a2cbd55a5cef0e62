r"""Does the tail of a batch contradict its body? What is asked before samples are evened out.

Samples whose gradients are larger than usual, the *tail*, are the hard ones or the wrong ones. To weigh them down helps
where they are wrong and harms where they are hard. Their gradients tell which: at the weights of the last layer, hard
samples pull the way the others pull, if further; wrong ones pull against it. (In the field two gradients with a
negative inner product are *in conflict*: Yu et al. 2020, "Gradient surgery for multi-task learning".)

Notation: ``v_i`` is the gradient of sample i's loss at the last layer's weights, over the root of ``s = mean |g_i|^2``;
``u_b`` and ``u_t`` are ``1/N sum v_i`` over body and tail. Inner products are in the metric that Adam would use,
``D = (q + .001 mean q)^-1/2``, q the running mean of ``(u_b + u_t)^2``, number by number, before this batch.

* ``c = <u_b, u_t>`` needs no correction for noise: no sample is in both.
* ``|u_b|^2`` does: each sample is in it twice. ``S_b = (|u_b|^2 - Q_b) N / (N - 1)`` with
  ``Q_b = 1/N^2 sum_body |v_i|^2`` is what it would be without noise; the same for the tail.
* Running means of all five. The *contradiction* is the cosine that is left when two standard errors are taken from it:
  ``kappa = max(0, -c - 2 se(c)) / sqrt((S_b + Q_b / 10)(S_t + Q_t / 10))``.
* Samples are evened out by the share ``p = min(1, 2 kappa)``; for the first ten batches by none.

The same sums say two things more:

* how much of a batch's gradient is signal: ``S / (S + Q)`` of body and tail together;
* where the signal is: ``T = S_t / (S_b + S_t)``. Late in a training the body is learned, and nearly all that is left to
  learn is in the tail. Then a bound on single samples slows it down: it is *lifted* by the share
  ``(1 - p) max(0, 4 T - 3)``, from three quarters of the signal on, and not where the tail contradicts.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from newton_plugin._curvature.running_mean import RunningMean, without_empty
from newton_plugin._errors import ArgumentError, check_positive, check_range

__all__ = ["GradientConflict", "Reading"]

_METRIC_DECAY = 0.99
_GROWTH = 10.0  # most that one batch may count for in the metric
_FLOOR = 1e-3  # of the metric's mean, below which no number counts for more
_MOST_OF_IT = 0.75  # of the signal: where the tail has more, the bound on single samples is lifted
_LEAST = 1e-5  # of decay^wait: later the count of a running mean does not tell one batch from the next


class Reading(NamedTuple):
    """What the batches so far say; no dimensions.

    Attributes:
        opened: p, the share by which samples are evened out.
        contradiction: kappa.
        signal: the share of signal in a batch's gradient at the last layer.
        lifted: how far the bound on single samples is lifted, in [0, 1].
    """

    opened: Tensor
    contradiction: Tensor
    signal: Tensor
    lifted: Tensor

    @staticmethod
    def none(like: Tensor) -> Reading:
        """That of no batch: nothing is evened out or lifted, and half may be signal."""
        zero = torch.zeros_like(like)
        return Reading(zero, zero, torch.full_like(like, 0.5), zero)


class GradientConflict:
    r"""How far the tail of a batch contradicts its body, and so how far samples are evened out.

    The constants were fixed before the runs that the evidence reports (``benchmarks/PROTOCOL.md``).

    Args:
        decay: of the running means of inner products, in (0, 1).
        errors: standard errors that are taken from the mean inner product before it counts; not negative.
        factor: p over the contradiction; positive.
        wait: batches with inner products before anything is evened out; the first batch has none.
        signal_decay: of the running means that tell the share of signal, in (0, 1).

    Raises:
        ArgumentError: a value outside of these ranges; a ``wait`` so long that ``decay^wait < 1e-5``.
    """

    def __init__(
        self,
        decay: float = 0.98,
        errors: float = 2.0,
        factor: float = 2.0,
        wait: int = 10,
        signal_decay: float = 0.998,
    ) -> None:
        self.decay = _checked_decay("decay", decay)
        self.errors = check_range("errors", errors, 0, math.inf)
        self.factor = check_positive("factor", factor)
        self.wait = _checked_wait(wait, self.decay)
        self.signal_decay = _checked_decay("signal_decay", signal_decay)
        self._metric = RunningMean()
        self._means = RunningMean()
        self._signal = RunningMean()

    def __repr__(self) -> str:
        names = ("decay", "errors", "factor", "wait", "signal_decay")
        return f"GradientConflict({', '.join(f'{name}={getattr(self, name):g}' for name in names)})"

    def metric(self, like: Tensor) -> Tensor:
        """D, (D,), from the batches before this one; not finite where none had a gradient: this one counts for nothing.

        Args:
            like: (D,), in the working dtype.
        """
        q = self._metric.last(like)
        if q is None:
            return torch.full_like(like, torch.nan)
        return torch.add(q, q.mean(), alpha=_FLOOR).rsqrt()

    def update(self, sums: Tensor, squares: Tensor, metric: Tensor, samples: Tensor) -> None:
        """Take in one batch of all ranks.

        Args:
            sums: of ``v_i`` over body and tail, (2, D).
            squares: of ``|v_i|^2`` in the metric, over body and tail, (2,).
            metric: D, (D,), as :meth:`metric` gave it for this batch.
            samples: N, no dimensions.
        """
        u = sums / samples
        products = (u * metric) @ u.mT  # (2, 2)
        # Body, tail, both: |u|^2, and what of it is a sample's product with itself.
        norms = torch.cat([products.diagonal(), products.sum().reshape(1)])
        own = torch.cat([squares, squares.sum().reshape(1)]) / samples.square()
        signal = (norms - own) * (samples / (samples - 1).clamp_min(1))
        c = products[:1, 1]
        self._metric.update(u.sum(0).square(), _METRIC_DECAY, _GROWTH)
        self._means.update(torch.cat([c, c.square(), signal[:2], (norms - signal)[:2]]), self.decay)
        self._signal.update(torch.stack([signal[2], norms[2]]), self.signal_decay)

    def read(self, like: Tensor) -> Reading:
        """What the batches so far say.

        Args:
            like: a tensor without dimensions, in the working dtype.
        """
        means, whole = self._means.last(like.new_empty(6)), self._signal.last(like.new_empty(2))
        if means is None or whole is None:
            return Reading.none(like)
        tiny = torch.finfo(means.dtype).tiny
        c, squared = means[0], means[1]
        error = (torch.addcmul(squared, c, c, value=-1).clamp_min(0) * self._spread()).sqrt()
        positive = means[2:].clamp_min(0)
        lengths = torch.add(positive[:2], positive[2:], alpha=0.1)
        kappa = torch.add(c, error, alpha=self.errors).clamp_max(0).abs() / (lengths.prod().sqrt() + tiny)
        # A mean over t batches counts as (1 - decay^t) / (1 - decay).
        waited = self._means.count > (1 - self.decay ** (self.wait + 0.5)) / (1 - self.decay)
        opened = (self.factor * kappa).clamp_max(1) * waited
        tail = positive[1] / (positive[0] + positive[1] + tiny)
        lifted = ((tail - _MOST_OF_IT) / (1 - _MOST_OF_IT)).clamp_min(0) * (1 - opened) * waited
        share = whole[0] / whole[1]  # 0 / 0 where nothing has come yet
        return Reading(opened, kappa, share.clamp(0, 1).nan_to_num(0.5), lifted)

    def _spread(self) -> Tensor:
        """The variance of a running mean over that of its values: sum w^2 / (sum w)^2 of its weights w."""
        # (1 - r^2t) / ((1 - r^2) count^2), with r^t = 1 - (1 - r) count.
        r, count = self.decay, self._means.count.clamp_min(1)
        return torch.rsub(count, 2 / (1 + r), alpha=(1 - r) / (1 + r)) / count

    def initial_state(self, size: int, like: Tensor) -> dict[str, Any]:
        """The state before the first batch, in the form of :meth:`state_dict` after it.

        Args:
            size: D.
            like: a tensor on the device of the steps, in the working dtype.
        """
        parts = {"metric": (size,), "means": (6,), "signal": (2,)}
        return {name: RunningMean.initial_state(shape, like) for name, shape in parts.items()}

    def state_dict(self) -> dict[str, Any]:
        """The running means; empty before the first batch."""
        means = {"metric": self._metric, "means": self._means, "signal": self._signal}
        return without_empty({name: mean.state_dict() for name, mean in means.items()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        for name, mean in (("metric", self._metric), ("means", self._means), ("signal", self._signal)):
            mean.load_state_dict(state.get(name, {}))


def _checked_decay(name: str, value: float) -> float:
    value = check_range(name, value, 0, 1)
    if not value:
        raise ArgumentError(f"{name} must be above 0; got {value:g}. One batch alone tells no contradiction.")
    return value


def _checked_wait(wait: float, decay: float) -> float:
    wait = check_range("wait", wait, 0, math.inf)
    longest = int(math.log(_LEAST) / math.log(decay))
    if wait > longest:
        raise ArgumentError(
            f"wait must be at most {longest} batches with decay={decay:g}, whose running mean forgets how many there "
            f"were; got {wait:g}. Take a decay nearer to 1, or a shorter wait."
        )
    return wait
