"""Which dimensions of the outputs are samples and which are features.

Outputs of any shape are seen as ``N`` rows of ``m`` features. By default the first dimension counts the samples and all
others are features: (N, C, H, W) has N rows of C*H*W features. ``feature_dims`` names the feature dimensions instead:
with ``feature_dims=1``, (N, C, H, W) has N*H*W rows of C features.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from newton_plugin._errors import ArgumentError, ArgumentTypeError, ShapeError

__all__ = ["RowLayout", "check_feature_dims", "layout_of"]


def check_feature_dims(feature_dims: int | Sequence[int] | None) -> tuple[int, ...] | None:
    """``feature_dims`` as a tuple; None stays None.

    Raises:
        ArgumentTypeError: neither None, nor an integer, nor a sequence of integers.
        ArgumentError: an empty sequence.
    """
    if feature_dims is None:
        return None
    dims = (feature_dims,) if isinstance(feature_dims, int) else tuple(feature_dims)
    if not all(isinstance(d, int) and not isinstance(d, bool) for d in dims):
        raise ArgumentTypeError(
            f"feature_dims must be None, an integer or a sequence of integers; got {feature_dims!r}."
        )
    if not dims:
        raise ArgumentError("feature_dims must name at least one dimension; got an empty sequence.")
    return dims


@dataclass(frozen=True)
class RowLayout:
    """The two-way map between outputs of shape ``shape`` and rows (N, m).

    Args:
        shape: shape of the outputs, with at least one dimension.
        feature_dims: the feature dimensions, or None for "everything but the first".

    Attributes:
        feature_axes, sample_axes: the dimensions that are features, and those that count samples, from the front.
        rows: N, the number of samples.
        groups: T, the number of rows in one entry of the first dimension: positions of a sequence, pixels of an image.
        features: m, the number of features of a sample.

    Raises:
        ShapeError: outputs without dimensions, or dimensions that do not exist.
    """

    shape: tuple[int, ...]
    feature_dims: tuple[int, ...] | None = None
    feature_axes: tuple[int, ...] = field(init=False, repr=False, compare=False)
    sample_axes: tuple[int, ...] = field(init=False, repr=False, compare=False)
    rows: int = field(init=False, repr=False, compare=False)
    groups: int = field(init=False, repr=False, compare=False)
    features: int = field(init=False, repr=False, compare=False)
    _is_rows: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ndim = len(self.shape)
        if ndim == 0:
            raise ShapeError(
                "outputs must have a batch dimension first, (N, ...); got a tensor without dimensions. "
                "Pass the outputs that enter the loss, not the loss itself."
            )
        features = tuple(range(1, ndim))
        if self.feature_dims is not None:
            wrapped = [d + ndim if d < 0 else d for d in self.feature_dims]
            if any(not 0 <= d < ndim for d in wrapped) or len(set(wrapped)) < len(wrapped):
                raise ShapeError(
                    f"feature_dims must name different dimensions of the outputs; got {self.feature_dims} "
                    f"for outputs of shape {self.shape}."
                )
            features = tuple(sorted(wrapped))
        samples = tuple(d for d in range(ndim) if d not in features)
        known = {
            "feature_axes": features,
            "sample_axes": samples,
            "rows": math.prod([self.shape[d] for d in samples]),
            "groups": math.prod([self.shape[d] for d in samples[1:]]),
            "features": math.prod([self.shape[d] for d in features]),
            "_is_rows": features == (1,) and ndim == 2,
        }
        for name, value in known.items():
            object.__setattr__(self, name, value)

    def to_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """(..., *shape) -> (..., N, m), any number of leading dimensions."""
        lead = tensor.ndim - len(self.shape)
        if not lead and self._is_rows:
            return tensor
        if self.feature_dims is not None:
            order = [*range(lead), *(lead + d for d in self.sample_axes), *(lead + d for d in self.feature_axes)]
            tensor = tensor.permute(order)
        return tensor.reshape(*tensor.shape[:lead], self.rows, self.features)

    def from_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """(..., N, m) -> (..., *shape), the inverse of :meth:`to_rows`."""
        lead = rows.ndim - 2
        if not lead and self._is_rows:
            return rows
        if self.feature_dims is None:
            return rows.reshape(*rows.shape[:lead], *self.shape)
        order = [*self.sample_axes, *self.feature_axes]
        tensor = rows.reshape(*rows.shape[:lead], *(self.shape[d] for d in order))
        back = [order.index(d) for d in range(len(order))]
        return tensor.permute([*range(lead), *(lead + d for d in back)])


@functools.lru_cache(maxsize=256)
def layout_of(shape: tuple[int, ...], feature_dims: tuple[int, ...] | None) -> RowLayout:
    """The layout of these arguments. It is needed at every step and depends on nothing else, so it is made once."""
    return RowLayout(shape, feature_dims)
