"""One boundary's rule: curvature, damping, their running state, and what went wrong so far."""

from __future__ import annotations

import inspect
import math
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from newton_plugin._curvature.damping import Damping
from newton_plugin._curvature.protocol import HVP, Curvature, CurvatureStep
from newton_plugin._errors import (
    ArgumentError,
    NonFiniteError,
    SingularCurvatureError,
)
from newton_plugin._linalg.damped_inverse import working_dtype
from newton_plugin._linalg.large_rows import row_products
from newton_plugin._runtime.processes import ONE_PROCESS, Ranks

__all__ = [
    "OnNonfinite",
    "StepRule",
]

OnNonfinite = Literal["keep", "raise"]


@dataclass
class StepRule:
    """From the gradients of one boundary to their step, whatever happens.

    A gradient that is not finite stays as it is, so that a GradScaler still sees it and skips the step; so
    does one whose C could not be inverted. Both are counted on the device, without waiting for it. What is judged is
    ``fine`` of the :class:`CurvatureStep`; whoever sends the step into the network puts the gradient in its place
    where it is not.
    """

    curvature: Curvature
    damping: Damping
    on_nonfinite: OnNonfinite = "keep"
    last: CurvatureStep | None = None
    last_gradient: Tensor | None = None
    last_weight: Tensor | None = None
    batched_probes: bool = True
    twice_differentiable: bool = False  # not known yet
    takes_ranks: bool = False  # not known yet
    _structural_fallbacks: int = 0
    _kept: Tensor | None = None
    _zero: Tensor | None = None
    _reported: set[str] = field(default_factory=set)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles keep the running state and not the last batch."""
        return {**self.__dict__, "last": None, "last_gradient": None, "last_weight": None}

    def wants_hessian(self, features: int) -> bool:
        """Whether the next step takes Hessian-vector products of outputs with so many features."""
        wants = getattr(self.curvature, "wants_hessian", None)
        return self.curvature.needs_hessian if wants is None else wants(features)

    def takes_form(self, wanted: bool) -> bool:
        """Whether the next step takes a Hessian in closed form; ``wanted``: what :meth:`wants_hessian` answered.

        "auto" takes one even where products would be too many; a curvature that keeps its C between refreshes does not.
        """
        return self.curvature.needs_hessian and (wanted or getattr(self.curvature, "refresh_every", 1) == 1)

    def __call__(
        self,
        gradient: Tensor,
        hvp: HVP | None = None,
        ranks: Ranks = ONE_PROCESS,
        groups: int = 1,
        weight: Tensor | None = None,
    ) -> CurvatureStep:
        """What the curvature makes of the rows, judged.

        Args:
            gradient: (N, m), of any floating dtype. The step is in the working dtype, or in that of the rows where
                the curvature :meth:`streams` them.
            hvp: see :meth:`Curvature.step`.
            ranks: the processes that share the batch.
            groups: rows of one sample.
            weight: of rows that are streamed; see :meth:`Curvature.step`.
        """
        if not (torch.is_grad_enabled() or torch.is_autocast_enabled(gradient.device.type)):
            # A backward pass. To enter contexts costs as much as an operation.
            return self._judged(gradient, hvp, ranks, groups, weight)
        with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
            return self._judged(gradient, hvp, ranks, groups, weight)

    def _judged(
        self, gradient: Tensor, hvp: HVP | None, ranks: Ranks, groups: int, weight: Tensor | None
    ) -> CurvatureStep:
        if ranks.many and not self.takes_ranks:
            self._check_takes_ranks()
        more: dict[str, Any] = {"ranks": ranks} if ranks.many else {}
        if not self.streams(gradient):
            gradient = gradient.to(working_dtype(gradient.device))
        elif weight is not None:
            more["weight"] = weight
        if getattr(self.curvature, "structure", None) == "block":
            more["groups"] = groups
        result = self.curvature.step(gradient, hvp, self.damping, **more)
        fine = self._fine(gradient, result)
        if not result.agreed:
            fine = ranks.all(fine)
        if self.on_nonfinite == "raise" and not bool(fine):
            self._raise(gradient, result)
        result.fine = fine
        self._count(fine, result)
        self.last, self.last_weight = result, weight
        self.last_gradient = gradient if getattr(result, "sizes", None) is None else None
        return result

    def _fine(self, gradient: Tensor, result: CurvatureStep) -> Tensor:
        """Whether all gradients and steps of this process are finite, and C is."""
        # What users' curvatures give back may be older than these two.
        if getattr(result, "bounded", False) and result.finite is not None:
            return result.finite
        inner = getattr(result, "inner", None)
        inner = row_products(gradient, result.step) if inner is None else inner
        fine = (torch.linalg.vector_norm(inner) if inner.ndim else inner) < math.inf
        return fine if result.finite is None else fine & result.finite

    def streams(self, gradient: Tensor) -> bool:
        """Whether the curvature takes these rows in their own dtype."""
        if gradient.dtype not in (torch.float32, torch.float64):
            return False
        streams = getattr(self.curvature, "streams", None)
        return streams is not None and streams(gradient)

    def _check_takes_ranks(self) -> None:
        if "ranks" not in inspect.signature(self.curvature.step).parameters:
            raise ArgumentError(
                f"curvature={self.curvature!r} cannot be averaged over processes: its step() takes no argument "
                "`ranks`. Add it (see npl.Curvature), or pass sync=False to give each process the C of its own samples."
            )
        self.takes_ranks = True

    def _raise(self, gradient: Tensor, result: CurvatureStep) -> None:
        bad = int((~torch.isfinite(gradient)).any(-1).sum())
        if bad:
            raise NonFiniteError(
                f"the gradient of the loss with respect to the outputs is not finite in {bad} of "
                f"{gradient.shape[0]} samples. Look at the loss at these outputs, or pass on_nonfinite='keep' "
                "to leave such gradients as they are."
            )
        if result.finite is not None and not bool(result.finite):
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

    def _count(self, fine: Tensor, result: CurvatureStep) -> None:
        self._kept = _counted(self._kept, ~fine)
        if result.fallback:
            self._structural_fallbacks += 1
            self._report(result.fallback)
        elif result.zero_hessian is not None:
            self._zero = _counted(self._zero, result.zero_hessian)
            if self._zero.device.type == "cpu":  # elsewhere a look would wait for the device
                self._report_zero()

    def _report_zero(self) -> None:
        if self._zero is not None and int(self._zero):
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
        """Batches so far that kept their plain gradient or used Fisher in place of the Hessian. Waits."""
        self._report_zero()
        return sum(int(c) for c in (self._kept, self._zero) if c is not None) + self._structural_fallbacks

    def state_dict(self) -> dict[str, Any]:
        """Running means and counters, as plain types and tensors."""
        return {
            "curvature": self.curvature.state_dict(),
            "damping": self.damping.state_dict() if hasattr(self.damping, "state_dict") else {},  # type: ignore[attr-defined]
            "structural_fallbacks": self._structural_fallbacks,
            "kept": _copy(self._kept),
            "zero": _copy(self._zero),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.curvature.load_state_dict(state["curvature"])
        if hasattr(self.damping, "load_state_dict"):
            self.damping.load_state_dict(state["damping"])  # type: ignore[attr-defined]
        self._structural_fallbacks = state["structural_fallbacks"]
        self._kept, self._zero = _copy(state["kept"]), _copy(state["zero"])


def _counted(count: Tensor | None, more: Tensor) -> Tensor:
    """A count on the device, with one more where ``more`` is true."""
    if count is None:
        return more.to(torch.int64)
    return count.to(more.device).add_(more)  # in place: the replays of a CUDA graph go on counting


def _copy(count: Tensor | None) -> Tensor | None:
    return None if count is None else count.clone()
