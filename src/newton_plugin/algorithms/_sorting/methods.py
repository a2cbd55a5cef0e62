"""From what a person types to a method object: "neural_sort", neural_sort or an instance.

A method is a callable ``scores -> P``. Those of this package can do more, each only what it is asked for: the
first rows of P (``rows``), ranks without P (``ranks``), logarithms (``log_probabilities``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from newton_plugin._errors import ArgumentTypeError, NewtonPluginError, check_choice
from newton_plugin.algorithms._sorting.neural_sort import NeuralSort, neural_sort
from newton_plugin.algorithms._sorting.soft_sort import SoftSort, soft_sort
from newton_plugin.algorithms._sorting_network.network import AnyLengthNetwork, SortingNetwork

__all__ = ["LogProbabilities", "Method", "matrix", "resolve"]


@runtime_checkable
class LogProbabilities(Protocol):
    """What RankingLoss asks of a method that is to be stable."""

    def log_probabilities(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """``(log P, log(1 - P))``, each (..., n, n), from scores (..., n)."""
        ...


Method: TypeAlias = "str | LogProbabilities | Callable[..., Any]"

_BY_NAME: dict[str, Callable[..., Any]] = {
    "neural_sort": NeuralSort,
    "soft_sort": SoftSort,
    "sorting_network": AnyLengthNetwork,
}
_ARGUMENTS = {
    "neural_sort": "temperature, e.g. 0.1",
    "soft_sort": "temperature, e.g. 0.1, and p, 1 or 2",
    "sorting_network": "layout, swap and steepness, all with defaults",
}
_BY_FUNCTION: list[tuple[Any, str]] = [
    (neural_sort, "neural_sort"),
    (soft_sort, "soft_sort"),
    (SortingNetwork, "sorting_network"),
]


def resolve(method: Any, arguments: dict[str, Any]) -> Any:
    """The method object for ``method`` with its keyword arguments; instances and other callables as they are."""
    name = next((name for function, name in _BY_FUNCTION if method is function), method)
    if isinstance(name, str):
        check_choice("method", name, tuple(_BY_NAME), "Or pass a callable: scores -> P.")
        try:
            return _BY_NAME[name](**arguments)
        except NewtonPluginError:
            raise
        except TypeError as error:
            given = ", ".join(sorted(arguments)) or "none"
            raise ArgumentTypeError(f"keyword arguments of {name!r}: {_ARGUMENTS[name]}; got {given}.") from error
    if not (callable(method) or isinstance(method, LogProbabilities)):
        raise ArgumentTypeError(
            f"method must be one of {', '.join(map(repr, _BY_NAME))} or a callable scores -> P; "
            f"got {type(method).__name__}."
        )
    if arguments:
        raise ArgumentTypeError(
            f"keyword arguments {sorted(arguments)} belong to a method given by name; method is {method!r}. "
            "Bind them first, e.g. functools.partial(method, ...)."
        )
    return method


def matrix(method: Any, scores: Tensor, k: int | None = None) -> Tensor:
    """P, or its first k rows, of a resolved method."""
    if k is not None and hasattr(method, "rows"):
        return method.rows(scores, k)
    p = method(scores)
    if isinstance(p, tuple):  # a SortingNetwork gives (sorted, P)
        p = p[1]
    return p if k is None else p[..., :k, :]
