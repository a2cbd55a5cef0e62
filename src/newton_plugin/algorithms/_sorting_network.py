"""Differentiable sorting networks: every comparator swaps a little.

A sorting network with its min and max softened (see ``_swaps``) is a chain of doubly stochastic matrices
``P = L_K ... L_1``, each of them 2x2 blocks ``[[v, q], [q, v]]`` with v + q = 1. Doubly stochastic, because
every factor is: no element is claimed twice, no rank is left out.

**One pass over values, then what is asked for.** The blocks depend on the values on the wires only, so a
first pass over vectors of length n finds them all. Then

* sorted values are what that pass ends with;
* ``P`` is the chain applied to the identity;
* soft ranks ``P^T (0, ..., n-1)`` are the transposed chain, last layer first, applied to *one* vector (each L
  is symmetric): ``P`` is never formed. The first k rows of ``P`` are the same with k unit vectors.

Each layer is one batched product of 2x2 matrices with pairs of neighbouring rows; ``_layers`` arranges the
wires so that they are neighbours.

**Logarithms.** ``log P`` follows the same chain with logaddexp in place of sums. The complement needs no new
idea: ``1 - P`` is also a vector on which the chain acts, since v (1 - p_a) + q (1 - p_b) = 1 - (v p_a + q
p_b). So ``log(1 - P)`` is the chain applied to ``log(1 - I)``, and nothing is ever subtracted from one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from newton_plugin._errors import ArgumentError, ArgumentTypeError, ShapeError, check_choice, check_positive
from newton_plugin.algorithms._layers import LAYOUTS, Layer, schedule
from newton_plugin.algorithms._log_domain import log_zero, wide
from newton_plugin.algorithms._neural_sort import check_scores
from newton_plugin.algorithms._swaps import SWAPS, log_swap, swap

__all__ = ["AnyLengthNetwork", "SortingNetwork"]


class SortingNetwork(torch.nn.Module):
    r"""Differentiable sorting network for lists of n scores.

    .. math:: P = L_K \cdots L_1, \qquad
        L = \begin{pmatrix} f(x) & f(-x) \\ f(-x) & f(x) \end{pmatrix}, \quad x = \text{steepness} \cdot (b -
        a)

    Args:
        n: length of the lists; any n >= 1.
        layout: ``"odd_even"`` (n layers) or ``"bitonic"`` (about log2(n)^2/2 layers).
        swap: ``"logistic"``, ``"cauchy"``, ``"gaussian"``, ``"reciprocal"`` or ``"optimal"``.
        steepness: an inverse temperature, > 0; towards infinity, the sorted values become ``torch.sort``.

    Call it with scores (..., n); it returns ``(sorted, P)``: (..., n) and (..., n, n), ``sorted = P @
    scores``, ascending; rows of P are ranks, rows and columns sum to one.

    Raises:
        ArgumentError, ArgumentTypeError: an argument outside its choices.
        ShapeError: scores of another length.

    Source: Petersen, Borgelt, Kuehne, Deussen, "Differentiable sorting networks for scalable sorting and
    ranking supervision", ICML 2021, section 3; "Monotonic differentiable sorting networks", ICLR 2022.

    Two wires, one comparator:

    >>> network = SortingNetwork(2, steepness=1.0)
    >>> values, P = network(torch.tensor([1.0, 0.0], dtype=torch.float64))
    >>> torch.allclose(P[0, 1], torch.sigmoid(torch.tensor(1.0, dtype=torch.float64)))
    True
    >>> values, P = SortingNetwork(3, steepness=1000.0)(torch.tensor([3.0, 1.0, 2.0]))
    >>> values.tolist()
    [1.0, 2.0, 3.0]
    """

    def __init__(self, n: int, layout: str = "odd_even", swap: str = "logistic", steepness: float = 10.0) -> None:
        super().__init__()
        if isinstance(n, bool) or not isinstance(n, int):
            raise ArgumentTypeError(f"n must be the length of the lists, an int; got {n!r}.")
        if n < 1:
            raise ArgumentError(f"n must be at least 1; got {n}. It is the length of the lists.")
        check_choice("layout", layout, LAYOUTS)
        check_choice("swap", swap, SWAPS)
        self._active: Tensor
        self.n, self.layout, self.swap = n, layout, swap
        self.steepness = check_positive("steepness", steepness, "Larger is sharper, e.g. 10.")
        self._layers, self._last = schedule(n, layout)
        active = torch.tensor([layer.active for layer in self._layers], dtype=torch.bool)
        self.register_buffer("_active", active.reshape(len(self._layers), (n + 1) // 2), persistent=False)

    def extra_repr(self) -> str:
        return f"{self.n}, layout={self.layout!r}, swap={self.swap!r}, steepness={self.steepness}"

    def forward(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """``(sorted, P)`` of scores (..., n)."""
        with _full_precision(scores):
            values, blocks = self._blocks(self._prepare(scores))
            state = _identity(values, self.n)
            for layer, block in zip(self._layers, blocks, strict=True):
                state = _apply(block, _gather(state, layer.gather))
            p = _gather(state, self._last)[..., : self.n, :]
        return values.to(scores.dtype), p.to(scores.dtype)

    def sort(self, scores: Tensor) -> Tensor:
        """The sorted values alone, ``P @ scores``, without P: (..., n) -> (..., n)."""
        with _full_precision(scores):
            return self._blocks(self._prepare(scores))[0].to(scores.dtype)

    def ranks(self, scores: Tensor) -> Tensor:
        """Soft ranks ``P^T (0, ..., n-1)``, without P: (..., n) -> (..., n)."""
        with _full_precision(scores):
            x = self._prepare(scores)
            places = torch.arange(self.n, dtype=x.dtype, device=x.device).unsqueeze(-1)
            return self._transposed(x, places.expand(*x.shape[:-1], self.n, 1)).squeeze(-1).to(scores.dtype)

    def rows(self, scores: Tensor, k: int) -> Tensor:
        """The first k rows of P, without the others: (..., n) -> (..., k, n)."""
        with _full_precision(scores):
            x = self._prepare(scores)
            units = torch.eye(self.n, k, dtype=x.dtype, device=x.device).expand(*x.shape[:-1], self.n, k)
            return self._transposed(x, units).transpose(-1, -2).to(scores.dtype)

    def log_probabilities(self, scores: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(log P, log(1 - P))``: scores (..., n) -> two of (..., n, n), in float64.

        ``lengths`` (...,): the first so many elements of each list are real. Odd-even layouts only: the first
        layers and wires of the network of n are the network of the shorter list.
        """
        if lengths is not None and self.layout != "odd_even":
            raise ArgumentError(
                f"mask needs layout='odd_even'; got layout={self.layout!r}. A bitonic network does not "
                "contain those of shorter lists: group the lists by length instead."
            )
        x = wide(self._prepare(scores))
        state = _log_identity(x, self.n)
        for layer, active in zip(self._layers, self._active, strict=True):
            x, state = _gather(x.unsqueeze(-1), layer.gather).squeeze(-1), _gather(state, layer.gather)
            if lengths is not None:
                active = active & _within(layer, lengths, self.n)
            a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
            log_v, log_q = log_swap(self.swap, self.steepness * (b - a))
            log_v = torch.where(active, log_v, 0.0)
            log_q = torch.where(active, log_q, log_zero(log_q))
            move = torch.exp(log_q) * (b - a)
            x = torch.stack((a + move, b - move), -1).flatten(-2)
            stay, cross = log_v[..., None, None], log_q[..., None, None]
            pairs = state.unflatten(-2, (-1, 2))
            state = _log_add(stay + pairs, cross + pairs.flip(-2)).flatten(-3, -2)
        state = _gather(state, self._last)[..., : self.n, :]
        return state[..., : self.n], state[..., self.n :]

    def _prepare(self, scores: Tensor) -> Tensor:
        check_scores(scores)
        if scores.shape[-1] != self.n:
            raise ShapeError(
                f"scores must have {self.n} elements in the last dimension, the n of this network; got "
                f"{tuple(scores.shape)}. Build one with SortingNetwork({scores.shape[-1]})."
            )
        x = scores.float() if scores.element_size() < 4 else scores
        return torch.nn.functional.pad(x, (0, self.n % 2))  # an odd n gets a wire that always rests

    def _blocks(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Sorted values (..., n), and per layer the 2x2 blocks (..., pairs, 2, 2)."""
        blocks = []
        for layer, active in zip(self._layers, self._active, strict=True):
            pairs = _gather(x.unsqueeze(-1), layer.gather).unflatten(-2, (-1, 2))
            gap = self.steepness * (pairs[..., 1, 0] - pairs[..., 0, 0])
            v = torch.where(active, swap(self.swap, gap), 1.0)
            q = torch.where(active, swap(self.swap, -gap), 0.0)
            block = torch.stack((v, q, q, v), -1).unflatten(-1, (2, 2))
            blocks.append(block)
            x = (block @ pairs).flatten(-3)
        return _gather(x.unsqueeze(-1), self._last).squeeze(-1)[..., : self.n], blocks

    def _transposed(self, x: Tensor, columns: Tensor) -> Tensor:
        """``P^T columns``: (..., n, k) -> (..., n, k)."""
        _, blocks = self._blocks(x)
        state = torch.nn.functional.pad(columns, (0, 0, 0, self.n % 2))
        state = _gather(state, _inverse(self._last))
        for layer, block in zip(reversed(self._layers), reversed(blocks), strict=True):
            state = _gather(_apply(block, state), _inverse(layer.gather))
        return state[..., : self.n, :]


class AnyLengthNetwork:
    """A sorting network for whatever length the scores have; one is built and kept per length and device."""

    def __init__(self, layout: str = "odd_even", swap: str = "logistic", steepness: float = 10.0) -> None:
        self._arguments = (layout, swap, steepness)
        self._networks: dict[tuple[int, torch.device], SortingNetwork] = {}
        SortingNetwork(1, *self._arguments)  # a wrong argument fails here, not at the first batch

    def __repr__(self) -> str:
        layout, swap, steepness = self._arguments
        return f"SortingNetwork(layout={layout!r}, swap={swap!r}, steepness={steepness})"

    def of(self, scores: Tensor) -> SortingNetwork:
        """The network for lists of this length, on this device."""
        check_scores(scores)
        key = (scores.shape[-1], scores.device)
        if key not in self._networks:
            self._networks[key] = SortingNetwork(key[0], *self._arguments).to(scores.device)
        return self._networks[key]

    def __call__(self, scores: Tensor) -> Tensor:
        """P: scores (..., n) -> (..., n, n)."""
        return self.of(scores)(scores)[1]

    def rows(self, scores: Tensor, k: int) -> Tensor:
        """The first k rows of P."""
        return self.of(scores).rows(scores, k)

    def ranks(self, scores: Tensor) -> Tensor:
        """Soft ranks, without P."""
        return self.of(scores).ranks(scores)

    def log_probabilities(self, scores: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(log P, log(1 - P))``."""
        return self.of(scores).log_probabilities(scores, lengths)


def _full_precision(scores: Tensor) -> torch.autocast:
    # Products of 2x2 blocks are matrix products to autocast, which would run them in half precision.
    return torch.autocast(scores.device.type, enabled=False)


def _apply(block: Tensor, state: Tensor) -> Tensor:
    """Blocks (..., pairs, 2, 2) times neighbouring rows of state (..., wires, k)."""
    return (block @ state.unflatten(-2, (-1, 2))).flatten(-3, -2)


def _gather(state: Tensor, gather: tuple[int, ...]) -> Tensor:
    """Rows of state (..., wires, k) in a new order; a rotation where it is one (its backward is a rotation
    too)."""
    wires, first = len(gather), gather[0]
    if all(gather[k] == (first + k) % wires for k in range(wires)):
        return state if first == 0 else state.roll(-first, -2)
    return state.index_select(-2, torch.tensor(gather, device=state.device))


def _inverse(gather: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(gather)), key=gather.__getitem__))


def _identity(x: Tensor, n: int) -> Tensor:
    """(..., wires, n): the identity, with a row of zeros for the wire that rests."""
    wires = n + n % 2
    return torch.eye(wires, n, dtype=x.dtype, device=x.device).expand(*x.shape[:-1], wires, n)


def _log_identity(x: Tensor, n: int) -> Tensor:
    """(..., wires, 2n): log I beside log(1 - I)."""
    one = torch.eye(x.shape[-1], n, dtype=torch.bool, device=x.device)
    logs = torch.zeros(x.shape[-1], 2 * n, dtype=x.dtype, device=x.device)
    logs = logs.masked_fill(torch.cat((~one, one), -1), log_zero(x))
    return logs.expand(*x.shape[:-1], x.shape[-1], 2 * n)


def _within(layer: Layer, lengths: Tensor, n: int) -> Tensor:
    """(..., pairs): whether the layer and both wires of a pair belong to the network of the shorter list."""
    # Odd-even pairs are (i, i + 1) with i of the parity of the layer, in this order.
    upper = torch.arange(len(layer.active), device=lengths.device) * 2 + layer.depth % 2 + 1
    return (upper < lengths.unsqueeze(-1)) & (layer.depth < lengths.unsqueeze(-1))


def _log_add(a: Tensor, b: Tensor) -> Tensor:
    """``log(exp a + exp b)``, with second derivatives that stay finite at any distance."""
    above = a >= b
    high, low = torch.where(above, a, b), torch.where(above, b, a)
    return high + torch.log1p(torch.exp(low - high))
