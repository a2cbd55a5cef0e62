"""The table of sorts, and the way from what a user passes ("neural_sort", neural_sort, an instance) to a method object.

**A new sort** is a class in a file beside this one, a row in ``_SORTS``, and a public name in ``algorithms/__init__``.
The class takes its keyword arguments, and ``__call__`` maps scores (..., n) to P (..., n, n), rows smallest first.
``log_probabilities(scores, lengths=None)`` makes it stable in RankingLoss and lets it take a mask. For speed alone it
may have ``rows(scores, k, lengths=None)``, the first k rows of P; ``ranks(scores, lengths=None)``, soft ranks without
P; and ``ranking(...)``, the derivatives of the ranking loss (``Ranking`` in ``_list_loss/function.py``). With
``lengths`` (...,) only the first so many elements of each list are real; what stands at the others does not matter.
``soft_sort.py`` is the shortest example.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar, runtime_checkable

import torch
from torch import Tensor

from newton_plugin._errors import ArgumentTypeError, NewtonPluginError, check_choice
from newton_plugin.algorithms._sorting.neural_sort import NeuralSort, neural_sort
from newton_plugin.algorithms._sorting.soft_sort import SoftSort, soft_sort
from newton_plugin.algorithms._sorting_network.any_length import AnyLengthNetwork
from newton_plugin.algorithms._sorting_network.network import SortingNetwork

__all__ = ["LogProbabilities", "Method", "matrix", "places", "resolve", "with_lengths"]


@runtime_checkable
class LogProbabilities(Protocol):
    """A method that RankingLoss can use in the log domain."""

    def log_probabilities(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """``(log P, log(1 - P))``, each (..., n, n), from scores (..., n)."""
        ...


Result = TypeVar("Result")
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


def matrix(method: Any, scores: Tensor, k: int | None = None, lengths: Tensor | None = None) -> Tensor:
    """P, or its first k rows, from what :func:`resolve` gave.

    With ``lengths`` (...,), each list's own P stands in the upper left corner, and zeros everywhere else.
    """
    if lengths is not None:
        return _ragged_matrix(method, scores, scores.shape[-1] if k is None else k, lengths)
    if k is not None and hasattr(method, "rows"):
        return method.rows(scores, k)
    p = method(scores)
    if isinstance(p, tuple):  # a SortingNetwork gives (sorted, P)
        p = p[1]
    return p if k is None else p[..., :k, :]


def _ragged_matrix(method: Any, scores: Tensor, k: int, lengths: Tensor) -> Tensor:
    if hasattr(method, "rows"):
        p = with_lengths(method, lambda: method.rows(scores, k, lengths))
    else:
        log_p = with_lengths(method, lambda: method.log_probabilities(scores, lengths))[0]
        p = log_p[..., :k, :].exp().to(scores.dtype)
    present = places(lengths, scores.shape[-1])
    return p * (present[..., :k].unsqueeze(-1) & present.unsqueeze(-2))


def places(lengths: Tensor, n: int) -> Tensor:
    """Which of n places a list of each length fills: (...,) -> (..., n)."""
    return torch.arange(n, device=lengths.device) < lengths.unsqueeze(-1)


def with_lengths(method: Any, call: Callable[[], Result]) -> Result:
    """What ``call`` returns, which gives lengths to ``method``; :class:`ArgumentTypeError` if that cannot take them."""
    if not isinstance(method, LogProbabilities):
        raise ArgumentTypeError(
            f"mask needs a method that knows list lengths; got the callable {method!r}. "
            "Use one of the methods given by name."
        )
    try:
        return call()
    except NewtonPluginError:
        raise
    except TypeError as error:
        raise ArgumentTypeError(
            f"mask needs a method that knows list lengths, log_probabilities(scores, lengths); {method!r} says: {error}"
        ) from error
