"""One boundary's rule: curvature, damping, their running state, and what went wrong so far."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from newton_plugin._curvature.protocol import HVP, CurvatureStep
from newton_plugin._derivatives.products import Probing
from newton_plugin._errors import ArgumentError, ArgumentTypeError, NonFiniteError, SingularCurvatureError
from newton_plugin._linalg.damped_inverse import HALF, working_dtype
from newton_plugin._runtime.processes import ONE_PROCESS, Ranks, finish_exchanges
from newton_plugin._runtime.transforms import readable
from newton_plugin._step.heads import LayerHead
from newton_plugin._step.running_state import RunningState

__all__ = ["OnNonfinite", "StepRule"]

OnNonfinite = Literal["keep", "raise"]


@dataclass
class StepRule(RunningState):
    """From the gradients of one boundary to their step, also for batches that are not finite.

    A gradient that is not finite stays as it is, so that a GradScaler still sees it and skips the step. A gradient
    whose C could not be inverted also stays. Both are counted on the device, without waiting for it. The verdict is
    ``finiteness.taken`` of the :class:`CurvatureStep`. Whoever sends the step into the network sends the gradient
    instead where it is false.

    Attributes:
        on_nonfinite: keep a gradient that is not finite, or raise.
        probing: what is known about differentiating this loss twice.
        last: the last step; without its rows, where ``last.sizes`` says how large they were.
        last_gradient: its rows, where ``last.sizes`` does not say how large they were.
        last_weight: their weight, where the rows were streamed.
        last_layer: what was seen of the last layer, for people; empty: the rule does not look.
        last_factor: what the last step was multiplied by before it was sent; None: by nothing.
        What is kept from step to step stands in :class:`RunningState`.
    """

    on_nonfinite: OnNonfinite = "keep"
    probing: Probing = field(default_factory=Probing)
    last: CurvatureStep | None = None
    last_gradient: Tensor | None = None
    last_weight: Tensor | None = None
    last_factor: Tensor | None = None
    last_layer: str = ""
    _reported: set[str] = field(default_factory=set)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles have the running state and not the last batch."""
        finish_exchanges()
        self.settle()
        return {**self.__dict__, "last": None, "last_gradient": None, "last_weight": None, "last_factor": None}

    @property
    def power(self) -> float:
        """Of the curvature; 1 where it says nothing."""
        return getattr(self.curvature, "power", 1.0)

    @property
    def one_number(self) -> bool:
        """Whether a step needs one number of all processes; see :attr:`Curvature.one_number`."""
        return self.curvature.names_statistics and self.curvature.one_number

    def wants_products(self, features: int) -> bool:
        """Whether the next step uses Hessian-vector products of outputs with so many features."""
        return self.curvature.wants_hessian(features)

    def wants_closed_form(self, features: int) -> bool:
        """Whether the next step uses a Hessian in closed form.

        A curvature that does without products may still use one. Between refreshes no Hessian is used.
        """
        return self.curvature.needs_hessian and (self.wants_products(features) or self.curvature.refresh_every == 1)

    def streams(self, gradient: Tensor, factor: Tensor | None = None) -> bool:
        """Whether the curvature takes these rows in their own dtype, and multiplies their steps by the factor."""
        simple = factor is None and gradient.dtype not in HALF
        return (simple or self.curvature.takes_factor) and self.curvature.streams(gradient)

    def __call__(
        self,
        gradient: Tensor,
        hvp: HVP | None = None,
        ranks: Ranks = ONE_PROCESS,
        groups: int = 1,
        weight: Tensor | None = None,
        live: Tensor | None = None,
        factor: Tensor | None = None,
        head: LayerHead | None = None,
    ) -> CurvatureStep:
        """The curvature's step for these rows, judged.

        Args:
            gradient: (N, m), of any floating dtype. The step is in the working dtype, or in that of the rows where
                the curvature :meth:`streams` them.
            hvp: see :meth:`Curvature.step`.
            ranks: the processes that share the batch.
            groups: rows of one sample.
            weight: of rows that are streamed; see :meth:`Curvature.step`.
            live: the number of rows that have a gradient, no dimensions; None: all.
            factor: by which the steps of rows that are streamed are multiplied; see :meth:`Curvature.step`.
            head: the last layer below the boundary; None: it is not seen, or nobody looks.
        """
        self.settle()
        if not (torch.is_grad_enabled() or torch.is_autocast_enabled(gradient.device.type)):
            # A backward pass. To enter contexts costs as much as an operation.
            return self._judged(gradient, hvp, ranks, groups, weight, live, factor, head)
        with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
            return self._judged(gradient, hvp, ranks, groups, weight, live, factor, head)

    def _judged(
        self,
        gradient: Tensor,
        hvp: HVP | None,
        ranks: Ranks,
        groups: int,
        weight: Tensor | None,
        live: Tensor | None,
        factor: Tensor | None,
        head: LayerHead | None,
    ) -> CurvatureStep:
        curvature = self.curvature
        more: dict[str, Any] = {}  # arguments beyond the first three
        if ranks.many:
            self._check_takes_ranks()
        if curvature.takes_ranks:
            more["ranks"] = ranks
        if not self.streams(gradient):
            gradient = gradient.to(working_dtype(gradient.device))
        elif weight is not None:
            more["weight"] = weight
            if factor is not None:
                more["factor"] = factor
        if live is not None and curvature.takes_live:
            more["live"] = live
        if head is not None and curvature.takes_head:
            more["head"] = head.rows(gradient)
        if curvature.structure == "block":
            more["groups"] = groups
        result = curvature.step(gradient, hvp, self.damping, **more)
        if not isinstance(result, CurvatureStep):
            raise ArgumentTypeError(
                f"curvature={curvature!r}: step() must return a npl.CurvatureStep; got {type(result).__name__}. "
                "Return npl.CurvatureStep(step, damping)."
            )
        taken = result.finiteness.judge(gradient, result.step, ranks)
        if self.on_nonfinite == "raise" and readable(taken) and not bool(taken):
            self._raise(gradient, result)
        self._count(taken, result)
        self.last, self.last_weight, self.last_factor = result, weight, None
        self.last_gradient = gradient if result.sizes is None else None
        if result.sizes is not None:  # nobody asks for the step itself, and it may be large
            self.last = replace(result, step=result.step.new_empty(len(result.step), 0))
        elif factor is not None:
            self.last_factor = factor.reciprocal()
        return result

    def _check_takes_ranks(self) -> None:
        if not self.curvature.takes_ranks:
            raise ArgumentError(
                f"curvature={self.curvature!r} cannot be averaged over processes: its step() takes no argument "
                "`ranks`. Add it (see npl.Curvature), or pass sync=False to give each process the C of its own samples."
            )

    def _raise(self, gradient: Tensor, result: CurvatureStep) -> None:
        bad = int((~torch.isfinite(gradient)).any(-1).sum())
        if bad:
            raise NonFiniteError(
                f"the gradient of the loss with respect to the outputs is not finite in {bad} of "
                f"{gradient.shape[0]} samples. Look at the loss at these outputs, or pass on_nonfinite='keep' "
                "to leave such gradients as they are."
            )
        finite = result.finiteness.curvature
        if finite is not None and not bool(finite):
            raise NonFiniteError(
                "the curvature C of this batch is not finite though the gradients of this process's samples are. Look "
                "at the second derivatives of the loss at these outputs (or at another rank's message), or use "
                "curvature='fisher'."
            )
        if bool(torch.isfinite(result.step).all()):
            raise NonFiniteError("the gradient or the step of another rank is not finite; see its message.")
        raise SingularCurvatureError(
            f"C + damping * I could not be inverted with damping {float(result.damping):.3g}: C is singular or "
            "not finite, and the damping too small against it. Raise the damping, or use damping='auto'."
        )

    def _count(self, taken: Tensor, result: CurvatureStep) -> None:
        in_place = not self.explicit
        self._gradients_not_stepped = _counted(self._gradients_not_stepped, ~taken, in_place)
        if result.fallback:
            self._structural_fallbacks += 1
            self._report(result.fallback)
        elif result.zero_hessian is not None:
            self._zero_hessians = _counted(self._zero_hessians, result.zero_hessian, in_place)
            if in_place and self._zero_hessians.device.type == "cpu":  # elsewhere a look would wait for the device
                self._report_zero()

    def _report_zero(self) -> None:
        if self._zero_hessians is not None and int(self._zero_hessians):
            self._report("the Hessian is zero at these outputs, as that of a piecewise linear loss")

    def _report(self, reason: str) -> None:
        """One warning for each cause."""
        if reason not in self._reported:
            self._reported.add(reason)
            warnings.warn(
                f"newton_plugin uses the empirical Fisher in place of {self.curvature!r}: {reason}.",
                UserWarning,
                stacklevel=2,
            )

    @property
    def fallbacks(self) -> int:
        """Batches so far that kept their gradient or used Fisher in place of the Hessian. Waits for the device."""
        self.settle()
        self._report_zero()
        counts = (self._gradients_not_stepped, self._zero_hessians)
        return sum(int(count) for count in counts if count is not None) + self._structural_fallbacks


def _counted(count: Tensor | None, more: Tensor, in_place: bool) -> Tensor:
    """A count on the device, with one more where ``more`` is true."""
    if count is None:
        return more.to(torch.int64)
    count = count.to(more.device)
    return count.add_(more) if in_place else count + more  # in place, the replays of a CUDA graph go on counting
