r"""The rule that knows when: samples are evened out where their tail contradicts their body, and batches are sized.

.. math:: \text{step}_i = \text{length} \cdot \frac{z}{\sqrt{b}} \; w_i \, g_i,
    \qquad w_i = 1 - p + p \, \frac{r}{r + x_i}, \quad x_i = |g_i|^2 / s, \quad r = 1 + \text{ratio}

* s: the running mean of ``mean |g_i|^2``, as the damping says: tr C of an isotropic Fisher.
* w_i, the *shape*. p = 1 evens samples out as ``(C + damping I + own g_i g_i' / m)^-1`` does. p = 0 leaves the weights
  that the loss gave them. p follows the contradiction of the batches before (``conflict.py``).
* No sample counts for more than ``most`` times ``mean |g|^2``: beyond that it is scaled down to it. Where nearly all
  signal is in the tail, this bound is lifted (``conflict.py``, too).
* b: the running mean of ``mean |w_i g_i|^2``. A batch is divided by no less than a third of its own root, so that no
  batch counts for more than three.
* z, the *size*: how a batch's length follows the gradient's (below).
* length: makes the first twenty steps as long as their gradients, so that a learning rate keeps its meaning.

Sizes, for gradients that shrink by a factor a (s by ``a^2``):

==========  ============================  =========================================================================
size        z                             a step changes by
==========  ============================  =========================================================================
"newton"    ``s^-1/2``                    1 / a: that of C^-1
"norm"      1                             1: batches of equal length
"signal"    ``(log z)' = e (log s)'``     between a and 1: ``e = 1 - 2 rho`` in [0, 1/2], rho the share of signal
"plain"     ``s^1/2``                     a: that of the gradient; no batch is bounded
"auto"                                    "plain" with SGD, which remembers no gradients, else "signal"
==========  ============================  =========================================================================
"""

from __future__ import annotations

import copy
import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from newton_plugin._curvature.batch import Batch
from newton_plugin._curvature.conflict import GradientConflict, Reading
from newton_plugin._curvature.damping import AutoDamping, Damping, damping_for
from newton_plugin._curvature.finiteness import Finiteness
from newton_plugin._curvature.head_sums import HeadRows, head_size, head_sums
from newton_plugin._curvature.length import Length
from newton_plugin._curvature.protocol import HVP, Curvature, CurvatureStep, Structure
from newton_plugin._curvature.running_mean import RunningMean, without_empty
from newton_plugin._curvature.signal_size import SignalSize
from newton_plugin._curvature.statistics import Statistics
from newton_plugin._derivatives.sample_hessians import SampleHessians
from newton_plugin._errors import ArgumentError, ArgumentTypeError, check_choice, check_positive
from newton_plugin._linalg.large_rows import are_large, divide
from newton_plugin._runtime.processes import ONE_PROCESS, Ranks

__all__ = ["GatedFisher", "LengthUnit", "Size", "relative_ratio"]

Size = Literal["auto", "signal", "norm", "newton", "plain"]
LengthUnit = Literal["gradient", "newton"]
_MOST = 9.0  # the square of how many times the running size one batch may count for


class GatedFisher(Curvature):
    """The isotropic Fisher that evens samples out only where their tail contradicts their body.

    It is a rule with a relative damping: it takes ``damping="auto"`` or an instance of :class:`AutoDamping`, whose
    ``ratio``, ``own``, ``decay``, ``growth`` and ``floor`` mean what they mean there.

    The contradiction is read at the weights of the last linear layer (or convolution) below the outputs. Where there is
    none to be seen, nothing is evened out, and size "signal" is "norm".

    Args:
        gate: "conflict"; an instance of :class:`GradientConflict`, for its constants; or a number in [0, 1], the share
            p by which samples are always evened out: 0 never, 1 as ``EmpiricalFisher("isotropic")`` does.
        size: how the length of a batch follows that of its gradient: "signal", "norm", "newton", "plain"; "auto" is
            "plain" where a door knows that the optimizer remembers no gradients (SGD), else "signal".
        most: no sample counts for more than that many times ``mean |g|^2``, except where nearly all signal is in the
            tail; infinite: none is bounded.
        length: "gradient": the first twenty steps are as long as their gradients, and the factor between them stays.
            "newton": the units of ``(C + damping I)^-1 g``.

    Raises:
        ArgumentError: at a step with a damping that is not relative.
    """

    structure: Structure = "isotropic"
    power = 1.0
    reading_names = ("gate", "contradiction", "signal", "lifted")

    def __init__(
        self,
        gate: Literal["conflict"] | float | GradientConflict = "conflict",
        size: Size = "auto",
        length: LengthUnit = "gradient",
        most: float = 2.0,
    ) -> None:
        self.most = check_positive("most", most) if most != math.inf else most
        check_choice("size", size, get_args(Size))
        check_choice("length", length, get_args(LengthUnit))
        self.gate, self.size, self.length = _checked(gate), size, length
        self._conflict = self.gate if isinstance(self.gate, GradientConflict) else GradientConflict()
        self._mean = RunningMean(nonnegative=True)
        self._weighted = RunningMean(nonnegative=True)
        self._length = Length()
        self._signal = SignalSize()

    def __repr__(self) -> str:
        size = f"{self.size!r}" + (f" (now {self._size!r})" if self.size == "auto" else "")
        return f"GatedFisher(gate={self.gate!r}, size={size}, length={self.length!r}, most={self.most:g})"

    @property
    def _size(self) -> str:
        """The size in force."""
        if self.size != "auto":
            return self.size
        return "plain" if self.memoryless else "signal"

    def streams(self, gradient: Tensor) -> bool:
        """See :meth:`Curvature.streams`. A subclass with a ``step`` of its own gets the gradients converted."""
        return are_large(gradient) and self.takes_weight

    @property
    def looks(self) -> bool:
        """See :attr:`Curvature.looks`: neither a fixed gate nor a size of another kind asks for the last layer."""
        return isinstance(self.gate, GradientConflict) or self._size == "signal"

    @property
    def one_number(self) -> bool:
        """See :attr:`Curvature.one_number`: what is asked beyond that number needs a second exchange."""
        return False

    def statistics(
        self, gradient: Tensor, damping: Damping, ranks: Ranks, groups: int = 1, live: Tensor | None = None
    ) -> Statistics | None:
        """See :meth:`Curvature.statistics`: ``sum_i |g_i|^2``."""
        batch = Batch(gradient, damping, ranks, live=live)
        squared, total = batch.squares()
        return Statistics(total, batch.samples, squared)

    def step(
        self,
        gradient: Tensor,
        hvp: HVP | None,
        damping: Damping,
        ranks: Ranks = ONE_PROCESS,
        weight: Tensor | None = None,
        live: Tensor | None = None,
        factor: Tensor | None = None,
        head: HeadRows | None = None,
    ) -> CurvatureStep:
        """See :meth:`Curvature.step`; ``hvp`` is not used."""
        ratio = relative_ratio(damping)
        batch = Batch(gradient, damping, ranks, 1, None if weight is None else weight.square(), live, factor)
        m = max(1, gradient.shape[1])
        squared, total = batch.squares()
        now = ranks.mean(total, batch.samples)
        mean = batch.averaged(self._mean, now)
        finite = self._mean.finite
        d = damping_for(damping, lambda: mean / m, gradient, finite=batch.averages)
        s = d * (m / ratio)  # the mean, but for its floor
        even = (1 + ratio) * s
        weights = even / torch.add(even, squared, alpha=damping.averaging.own)  # of samples that are evened out
        reading = self._reading(head, s)
        bounded = (self.most * s / squared).clamp_max(1).sqrt()
        shape = torch.lerp(torch.ones_like(weights), weights, reading.opened)
        shape = shape * torch.lerp(bounded, torch.ones_like(bounded), reading.lifted)
        weighted = self._taken_in(batch, head, s, shape.square() * squared, squared <= s)
        b = batch.averaged(self._weighted, weighted)
        bound = b if self._size == "plain" else torch.maximum(b, weighted / _MOST)
        size = self._z(s, reading.signal) * (bound + (s - mean).clamp_min(0)).rsqrt()
        aim = now if self.length == "gradient" else now * (m / even).square()
        size = size * self._length.update(aim, weighted * size.square())
        by = (size * shape).reciprocal()
        covers = ranks.covers
        return CurvatureStep(
            divide(gradient, by, factor),
            d,
            mean / m,
            lambda: (mean / m, mean / m),
            finiteness=Finiteness(finite, covers, None, covers),
            sizes=(lambda: (total, (squared / by / by).sum())) if are_large(gradient) else None,
            readings=dict(zip(self.reading_names, reading, strict=True)),
        )

    def _reading(self, head: HeadRows | None, s: Tensor) -> Reading:
        """What the batches before this one say."""
        if self._looks_at(head):
            reading = self._conflict.read(s)
        else:
            reading = Reading.none(s)._replace(contradiction=torch.full_like(s, torch.nan))
        if not isinstance(self.gate, GradientConflict):
            reading = reading._replace(opened=torch.full_like(s, self.gate))
        return reading

    def _taken_in(self, batch: Batch, head: HeadRows | None, s: Tensor, squared: Tensor, body: Tensor) -> Tensor:
        """The mean of ``squared``; what the batch says of contradictions is taken in for the next one."""
        looks = self._looks_at(head)
        parts = [squared.sum().reshape(1)]
        metric = s
        if looks:
            assert head is not None
            unit = s if batch.unit is None else s * batch.unit
            found = head_sums(head, torch.stack([body, ~body]), unit.rsqrt())
            sums = found.sums.to(s.dtype)
            metric = self._conflict.metric(sums[0])
            parts += [sums.flatten(), found.squares.to(s.dtype) @ metric]
        if batch.ranks.many:
            count = _as_tensor(batch.samples, s).reshape(1)
            *parts, count = batch.ranks.sum(torch.cat([*parts, count])).split([len(part) for part in parts] + [1])
            samples = count[0].clamp_min(1)
        else:
            samples = _as_tensor(batch.samples, s)
        if looks:
            self._conflict.update(parts[1].view(2, -1), parts[2], metric, samples)
        return parts[0][0] / samples

    def _looks_at(self, head: HeadRows | None) -> bool:
        return head is not None and self.looks

    def _z(self, s: Tensor, signal: Tensor) -> Tensor:
        if self._size == "newton":
            return s.rsqrt()
        if self._size == "plain":
            return s.sqrt()
        return torch.ones_like(s) if self._size == "norm" else self._signal.update(s, signal)

    def initial_state(
        self,
        gradient: Tensor,
        damping: Damping,
        groups: int = 1,
        hessians: SampleHessians | None = None,
        head: HeadRows | None = None,
    ) -> dict[str, Any]:
        """See :meth:`Curvature.initial_state`."""
        state: dict[str, Any] = {}  # in the order of state_dict()
        if damping.averaging.decay:
            state |= {name: RunningMean.initial_state((), gradient) for name in ("mean", "weighted")}
        state["length"] = self._length.initial_state(gradient)
        if self._size == "signal":
            state["signal"] = self._signal.initial_state(gradient)
        if self._looks_at(head):
            assert head is not None
            state["conflict"] = self._conflict.initial_state(head_size(head), gradient)
        return state

    def state_dict(self) -> dict[str, Any]:
        """The running means of sizes and, where the last layer is seen, of what contradicts."""
        return without_empty({name: part.state_dict() for name, part in self._parts().items()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        parts = self._parts()
        if not state.keys() <= parts.keys():
            raise KeyError("the state of another curvature")
        for name, part in parts.items():
            part.load_state_dict(state.get(name, {}))

    def _parts(self) -> dict[str, Any]:
        return {
            "mean": self._mean,
            "weighted": self._weighted,
            "length": self._length,
            "signal": self._signal,
            "conflict": self._conflict,
        }


def _checked(gate: Any) -> float | GradientConflict:
    """The gate as an instance of its own, or as a number."""
    if isinstance(gate, GradientConflict):
        return copy.deepcopy(gate)
    if gate == "conflict" and isinstance(gate, str):
        return GradientConflict()
    if isinstance(gate, bool) or not isinstance(gate, (int, float)):
        raise ArgumentTypeError(
            f"gate must be 'conflict', an npl.GradientConflict or a number in [0, 1]; got {gate!r} of type "
            f"{type(gate).__name__}. 0 never evens samples out, 1 always does."
        )
    if not 0 <= gate <= 1:
        raise ArgumentError(f"gate must be in [0, 1]; got {gate!r}. 0 never evens samples out, 1 always does.")
    return float(gate)


def _as_tensor(count: Tensor | int, like: Tensor) -> Tensor:
    return count.to(like) if isinstance(count, Tensor) else torch.full_like(like, count)


def relative_ratio(damping: Damping) -> float:
    """The ratio of a damping that a gated rule takes.

    Raises:
        ArgumentError: a damping of another kind.
    """
    # s is found back from the damping: so value() has to be that of the class.
    if not isinstance(damping, AutoDamping) or type(damping).value is not AutoDamping.value:
        raise ArgumentError(
            f"GatedFisher takes damping='auto' or an npl.AutoDamping, whose size is relative; got {damping!r}. Use "
            "curvature='fisher' with structure='isotropic' for a damping of another kind."
        )
    return damping.ratio
