"""The table of sorts, and the way from what a user passes ("neural_sort", neural_sort, an instance) to a method object.

**A new sort** is a class in a file beside this one, a row in ``_SORTS``, and a public name in ``algorithms/__init__``.
The class takes its keyword arguments, and ``__call__`` maps scores (..., n) to P (..., n, n), rows smallest first.
``log_probabilities(scores, lengths=None)`` makes it stable in RankingLoss and lets it take a mask. For speed alone it
may have ``rows(scores, k)``, the first k rows of P; ``ranks(scores)``, soft ranks without P; and ``ranking(...)``, the
derivatives of the ranking loss (``Ranking`` in ``_list_loss/function.py``). ``soft_sort.py`` is the shortest example.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from newton_plugin._errors import ArgumentTypeError, NewtonPluginError, check_choice
from newton_plugin.algorithms._sorting.neural_sort import NeuralSort, neural_sort
from newton_plugin.algorithms._sorting.soft_sort import SoftSort, soft_sort
from newton_plugin.algorithms._sorting_network.network import AnyLengthNetwork, SortingNetwork

__all__ = ["LogProbabilities", "Method", "matrix", "resolve"]


@runtime_checkable
class LogProbabilities(Protocol):
    """A method that RankingLoss can use in the log domain."""

    def log_probabilities(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """``(log P, log(1 - P))``, each (..., n, n), from scores (..., n)."""
        ...


Method: TypeAlias = "str | LogProbabilities | Callable[..., Any]"


class _Sort(NamedTuple):
    """A row of the table."""

    build: Callable[..., Any]  # from keyword arguments to a method object
    public: Any  # what a user may pass in place of the name
    arguments: str  # for the error message


_SORTS = {
    "neural_sort": _Sort(NeuralSort, neural_sort, "temperature, e.g. 0.1"),
    "soft_sort": _Sort(SoftSort, soft_sort, "temperature, e.g. 0.1, and p, 1 or 2"),
    "sorting_network": _Sort(AnyLengthNetwork, SortingNetwork, "layout, swap and steepness, all with defaults"),
}


def resolve(method: Any, arguments: dict[str, Any]) -> Any:
    """The method object of a named sort with its keyword arguments; instances and other callables as they are."""
    name = next((name for name, sort in _SORTS.items() if method is sort.public), method)
    if isinstance(name, str):
        check_choice("method", name, tuple(_SORTS), "Or pass a callable: scores -> P.")
        try:
            return _SORTS[name].build(**arguments)
        except NewtonPluginError:
            raise
        except TypeError as error:
            given = ", ".join(sorted(arguments)) or "none"
            raise ArgumentTypeError(f"keyword arguments of {name!r}: {_SORTS[name].arguments}; got {given}.") from error
    if not (callable(method) or isinstance(method, LogProbabilities)):
        raise ArgumentTypeError(
            f"method must be one of {', '.join(map(repr, _SORTS))} or a callable scores -> P; "
            f"got {type(method).__name__}."
        )
    if arguments:
        raise ArgumentTypeError(
            f"keyword arguments {sorted(arguments)} belong to a method given by name; method is {method!r}. "
            "Bind them first, e.g. functools.partial(method, ...)."
        )
    return method


def matrix(method: Any, scores: Tensor, k: int | None = None) -> Tensor:
    """P, or its first k rows, from what :func:`resolve` gave."""
    if k is not None and hasattr(method, "rows"):
        return method.rows(scores, k)
    p = method(scores)
    if isinstance(p, tuple):  # a SortingNetwork gives (sorted, P)
        p = p[1]
    return p if k is None else p[..., :k, :]
