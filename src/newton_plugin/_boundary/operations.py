"""The names of operations, by what they do to weights and data."""

from __future__ import annotations

import functools

__all__ = ["ELEMENTWISE", "LOOKUPS", "PRODUCTS", "REARRANGE", "WEIGHTED", "is_layer_name"]

PRODUCTS = frozenset(("Mm", "Bmm", "Mv"))
WEIGHTED = PRODUCTS | {"Addmm", "Addmv", "Baddbmm", "Addbmm", "Convolution", "ConvolutionOverrideable", "Dot"}
# Parts of the names of operations that apply parameters to data, or pick from parameters by data, whatever the shapes.
_NAMES = (
    *("mm", "mv", "conv", "batchnorm", "layernorm", "groupnorm", "rmsnorm", "rnn", "lstm", "gru", "attention"),
    *("embedding", "index", "gather", "compiledfunction", "differentiablegraph"),
)
LOOKUPS = frozenset(("Index", "IndexSelect", "Gather", "Take", "TakeAlongDim"))
# Element by element: with a parameter they are arithmetic of a loss where a layer lies below.
ELEMENTWISE = frozenset(("Add", "Sub", "Rsub", "Mul", "Div", "Pow", "Maximum", "Minimum", "Where", "Addcmul")) | {
    *("Addcdiv", "Lerp", "LogAddExp", "Logaddexp", "Atan2", "Xlogy", "PreluKernel", "MseLoss", "SmoothL1Loss"),
    *("HuberLoss", "BinaryCrossEntropy", "BinaryCrossEntropyWithLogits", "KlDiv", "Hypot", "Fmax", "Fmin"),
}
# They change the places, the shape or the dtype of a weight's numbers, or choose among them.
REARRANGE = frozenset(("Alias", "AsStrided", "Cat", "Clone", "ConstantPadNd", "Contiguous", "CopySlices", "Expand")) | {
    *("Flip", "Gather", "Index", "IndexPut", "IndexSelect", "MaskedFill", "MaskedScatter", "Permute", "Repeat"),
    *("ReshapeAlias", "Roll", "Scatter", "ScatterAdd", "Select", "SelectScatter", "Slice", "SliceScatter", "Squeeze"),
    *("Stack", "T", "ToCopy", "Transpose", "Tril", "Triu", "Unfold", "UnsafeView", "Unsqueeze", "View", "Where"),
}


@functools.cache
def is_layer_name(name: str) -> bool:
    """Whether a node of this name applies parameters to data wherever it has any."""
    return any(word in name.lower() for word in _NAMES) and name.split("Backward")[0] not in PRODUCTS
