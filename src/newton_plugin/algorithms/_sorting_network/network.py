"""Differentiable sorting networks: every comparator swaps its inputs in part.

A sorting network with its min and max softened (``swaps.py``) is a chain of matrices ``P = L_K ... L_1``, each of 2x2
blocks ``[[v, q], [q, v]]`` with v + q = 1. Every factor is doubly stochastic, so P is too: no element is claimed
twice, no rank is left out.

**One pass over values, then only what is needed.** The blocks depend on the values on the wires only, so a
first pass over vectors of length n finds them all. Then

* sorted values are the chain applied to one vector of length n;
* ``P`` is the chain applied to the identity;
* soft ranks ``P^T (0, ..., n-1)`` are the transposed chain, last layer first, applied to *one* vector (each L
  is symmetric): ``P`` is never formed. The first k rows of ``P`` are the same with k unit vectors.

A layer is one vectorised operation on slices (``layers.py``): with D = second - first, ``first + q D`` and
``second - q D``. Of entries that are not negative these never go below 0, rounding included, because q <= 1 and
D >= -first. The lists of a batch are the last dimension of a state, (wires, columns, lists): the share q of a pair
differs from list to list and is the same in all columns, so that every operation runs along contiguous memory.

**Logarithms.** ``log P`` follows the same chain with logaddexp in place of sums. The complement needs no new
idea: ``1 - P`` is also a vector on which the chain acts, since v (1 - p_a) + q (1 - p_b) = 1 - (v p_a + q
p_b). So ``log(1 - P)`` is the chain applied to ``log(1 - I)``, and nothing is ever subtracted from one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from newton_plugin._errors import ArgumentError, ArgumentTypeError, ShapeError, check_choice, check_positive
from newton_plugin.algorithms._list_loss.chunks import InChunks, chunk_of
from newton_plugin.algorithms._list_loss.function import row_weight
from newton_plugin.algorithms._list_loss.row_loss import RowLoss
from newton_plugin.algorithms._list_loss.scores import check_lengths, check_scores
from newton_plugin.algorithms._log_domain import log_zero, wide
from newton_plugin.algorithms._sorting_network.chain import Chain
from newton_plugin.algorithms._sorting_network.layers import LAYOUTS, Layer, join, schedule, split
from newton_plugin.algorithms._sorting_network.logits import NetworkLogits
from newton_plugin.algorithms._sorting_network.ragged import BitonicLists, Lists, OddEvenLists
from newton_plugin.algorithms._sorting_network.swaps import SWAPS, log_swap, swap

__all__ = ["SortingNetwork"]


class SortingNetwork(torch.nn.Module):
    r"""Differentiable sorting network for lists of n scores.

    .. math:: P = L_K \cdots L_1, \qquad L = \begin{pmatrix} f(x) & f(-x) \\ f(-x) & f(x) \end{pmatrix}

    with x = steepness * (b - a) for each pair of wires that meet.

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
        self.n, self.layout, self.swap = n, layout, swap
        self.steepness = check_positive("steepness", steepness, "Larger is sharper, e.g. 10.")
        self._resting, self._layers = schedule(n, layout)
        self._directions: Tensor
        directions = [layer.direction for layer in self._layers] if layout == "bitonic" else []
        self.register_buffer("_directions", torch.tensor(directions, dtype=torch.int8), persistent=False)

    def extra_repr(self) -> str:
        return f"{self.n}, layout={self.layout!r}, swap={self.swap!r}, steepness={self.steepness}"

    def forward(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """``(sorted, P)`` of scores (..., n)."""
        x = self._prepare(scores)
        # The compiler fuses ordinary operations; without it, Chain needs fewer of them.
        state = self.plain_chain(x) if torch.compiler.is_compiling() else Chain.apply(x, self)[0]
        p = self._to_lists(state, scores)
        values = (p * scores.to(p.dtype).unsqueeze(-2)).sum(-1)  # exact where P is 0 or 1
        return values.to(scores.dtype), p.to(scores.dtype)

    @property
    def layers(self) -> list[Layer]:
        """Layers of comparators, in the order in which they act."""
        return self._layers

    @property
    def rides(self) -> bool:
        """Whether the values are one more column of P: fewer operations. For long lists they come first, in float64."""
        return self.n < 64

    def identity(self, x: Tensor) -> Tensor:
        """(wires, n, lists), for values x (wires, 1, lists)."""
        return self._columns(torch.eye(self.n, dtype=x.dtype, device=x.device), x)

    def plain_chain(self, x: Tensor) -> Tensor:
        """P as a state (wires, n, lists), in ordinary operations: autograd can differentiate it any number of times."""
        state = self.identity(x)
        if not self.rides:
            _, shares = self._swap_shares(x)
            for layer, q in zip(self._layers, shares, strict=True):
                state = _apply(q, state, layer)
            return state
        state = torch.cat((state, x), 1)
        for layer, slope in zip(self._layers, self.slopes(x), strict=True):
            a, b = split(state, layer)
            gap = b - a
            move = self._share(gap[..., self.n :, :], slope) * gap
            state = join(a + move, b - move, state, layer)
        return state.narrow(1, 0, self.n)

    def sort(self, scores: Tensor) -> Tensor:
        """The sorted values alone, ``P @ scores``, without P: (..., n) -> (..., n)."""
        values, _ = self._swap_shares(self._prepare(scores))
        return self._to_lists(values, scores).squeeze(-1).to(scores.dtype)

    def ranks(self, scores: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Soft ranks ``P^T (0, ..., n-1)``, without P: (..., n) -> (..., n)."""
        x = self._prepare(scores)
        places = torch.arange(self.n, dtype=x.dtype, device=x.device).unsqueeze(-1)
        return self._to_lists(self._transposed(x, places, lengths), scores).squeeze(-1).to(scores.dtype)

    def rows(self, scores: Tensor, k: int, lengths: Tensor | None = None) -> Tensor:
        """The first k rows of P, without the others: (..., n) -> (..., k, n)."""
        x = self._prepare(scores)
        units = torch.eye(self.n, k, dtype=x.dtype, device=x.device)
        return self._to_lists(self._transposed(x, units, lengths), scores).transpose(-1, -2).to(scores.dtype)

    def log_probabilities(self, scores: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(log P, log(1 - P))``: scores (..., n) -> two of (..., n, n), in float64.

        With ``lengths`` (...,) only the first so many elements of each list are real, and each list goes through the
        network of its own length.
        """
        x = wide(self._prepare(scores))
        if lengths is not None:
            check_lengths(scores, lengths)
        state = self._of_one(self._log_identity(x), x)
        lists = self._ragged(lengths, x)
        if lists is not None:
            x, state = lists.enter(x), lists.enter(state)
        for depth, (layer, slope) in enumerate(zip(self._layers, self.slopes(x), strict=True)):
            a, b = split(x, layer)
            if lists is not None:
                active, slope = lists.active(layer, depth), lists.slope(layer, depth, slope)
            else:
                active = slope != 0 if isinstance(slope, Tensor) and self._resting else None
            log_v, log_q = log_swap(self.swap, (a - b) * slope)
            if active is not None:
                log_v = torch.where(active, log_v, 0.0)
                log_q = torch.where(active, log_q, log_zero(log_q))
            move = torch.exp(log_q) * (b - a)
            x = join(a + move, b - move, x, layer)
            p, r = split(state, layer)
            state = join(_log_add(log_v + p, log_q + r), _log_add(log_q + p, log_v + r), state, layer)
        log_p, log_rest = (state if lists is None else lists.leave(state)).chunk(2, 1)
        return self._to_lists(log_p, scores), self._to_lists(log_rest, scores)

    def ranking(self, scores: Tensor, target: Tensor, lengths: Tensor | None = None) -> InChunks:
        """The ranking loss of lists (N, n), n >= 2, with its derivatives: see ``RankingLoss``."""

        def part(lists: slice) -> RowLoss:
            some = None if lengths is None else lengths[lists]
            return RowLoss(self._logits(scores[lists], some), target[lists], row_weight(scores[lists], some))

        wires = self.n + self._resting
        return InChunks(part, scores.shape[0], 16 * chunk_of(scores, 2 * wires * self.n), keep=False)

    def _logits(self, scores: Tensor, lengths: Tensor | None) -> NetworkLogits:
        x = wide(self._prepare(scores))
        directions = torch.eye(self.n, dtype=x.dtype, device=x.device)
        states = [x, self._log_identity(x).narrow(1, 0, self.n), self._columns(directions, x)]
        slopes = self.slopes(x)
        active: list[Tensor | None]
        if lengths is None:
            active = [s != 0 if isinstance(s, Tensor) and self._resting else None for s in slopes]
            enter = leave = leave_adjoint = lambda state: state
        else:
            lists = self._ragged(lengths, x)
            assert lists is not None
            slopes = [
                lists.slope(layer, depth, s) for depth, (layer, s) in enumerate(zip(self._layers, slopes, strict=True))
            ]
            active = [lists.active(layer, depth) for depth, layer in enumerate(self._layers)]
            enter, leave, leave_adjoint = lists.enter, lists.leave, lists.leave_adjoint
        x, logs, directions = (enter(state) for state in states)

        def to_state(of_lists: Tensor) -> Tensor:
            return leave_adjoint(self._with_resting(of_lists.permute(1, 2, 0)))

        def to_lists(state: Tensor) -> Tensor:
            return self._to_lists(leave(state), scores)

        return NetworkLogits(x, logs, self._layers, slopes, active, self.swap, directions, to_state, to_lists)

    def _ragged(self, lengths: Tensor | None, x: Tensor) -> Lists | None:
        """Where the lists of x (wires, 1, lists) lie; None if all fill the network, or nothing is sorted."""
        if lengths is None or not self._layers:
            return None
        if self.layout == "odd_even":
            return OddEvenLists(lengths.flatten())
        return BitonicLists(lengths.flatten(), x.shape[0], self._resting, self.steepness)

    def _prepare(self, scores: Tensor) -> Tensor:
        """(..., n) -> (wires, 1, lists)."""
        check_scores(scores)
        if scores.shape[-1] != self.n:
            raise ShapeError(
                f"scores must have {self.n} elements in the last dimension, the n of this network; got "
                f"{tuple(scores.shape)}. Build one with SortingNetwork({scores.shape[-1]})."
            )
        x = scores.float() if scores.element_size() < 4 else scores
        return self._with_resting(x.unsqueeze(0).flatten(0, -2).t().unsqueeze(1))

    def _columns(self, columns: Tensor, x: Tensor) -> Tensor:
        """The same columns (n, k) for every list of x: (wires, k, lists)."""
        return self._with_resting(columns.unsqueeze(-1)).expand(-1, -1, x.shape[-1])

    def _to_lists(self, state: Tensor, scores: Tensor) -> Tensor:
        """(wires, k, lists) -> (..., n, k), where (...,) is the batch shape of the scores."""
        state = state.narrow(0, self._resting, self.n).permute(2, 0, 1).contiguous()
        return state.reshape(*scores.shape[:-1], *state.shape[1:])

    def _with_resting(self, state: Tensor) -> Tensor:
        """Puts zeros, for the wires that rest, before the real wires."""
        return torch.cat((state.new_zeros(self._resting, *state.shape[1:]), state)) if self._resting else state

    def slopes(self, x: Tensor) -> list[float | Tensor]:
        """For each layer the factor of the gap b - a in a swap: minus the steepness, with the sign of the direction.

        One number where every pair has the same direction; otherwise (blocks, step, 1, 1), with 0 where a pair rests.
        """
        if self.layout == "odd_even":
            return [-self.steepness] * len(self._layers)
        slopes = (self._directions.to(x.dtype) * -self.steepness).unbind(0)
        return [s.view(-1, layer.step, 1, 1) for s, layer in zip(slopes, self._layers, strict=True)]

    def _share(self, gap: Tensor, slope: float | Tensor) -> Tensor:
        """The share q that changes wires in one layer, from the gaps b - a (blocks, step, 1, lists)."""
        q = swap(self.swap, gap * slope)
        return q * (slope != 0) if self._resting and isinstance(slope, Tensor) else q

    def _swap_shares(self, x: Tensor, lists: Lists | None = None) -> tuple[Tensor, list[Tensor]]:
        """Sorted values (wires, 1, lists), and the share q (blocks, step, 1, lists) of each layer; float64 inside.

        With ``lists``, x and the values are where these lie.
        """
        dtype, shares = x.dtype, []
        x = wide(x)
        for depth, (layer, slope) in enumerate(zip(self._layers, self.slopes(x), strict=True)):
            a, b = split(x, layer)
            if lists is None:
                q = self._share(b - a, slope)
            else:
                q = swap(self.swap, (b - a) * lists.slope(layer, depth, slope)) * lists.active(layer, depth)
            shares.append(q.to(dtype))
            x = join(torch.lerp(a, b, q), torch.lerp(b, a, q), x, layer)  # exact at q = 0 and q = 1
        return x.to(dtype), shares

    def _transposed(self, x: Tensor, columns: Tensor, lengths: Tensor | None = None) -> Tensor:
        """``P^T columns``: x (wires, 1, lists), columns (n, k) -> (wires, k, lists).

        With ``lengths``, of the first so many elements and columns of each list; the others hold anything finite.
        """
        state, lists = self._of_one(self._columns(columns, x), x), self._ragged(lengths, x)
        if lists is not None:
            x, state = lists.enter(x), lists.enter(state)
        _, shares = self._swap_shares(x, lists)
        for layer, q in zip(reversed(self._layers), reversed(shares), strict=True):
            state = _apply(q, state, layer)
        return state if lists is None else lists.leave(state)

    def _of_one(self, state: Tensor, x: Tensor) -> Tensor:
        """The state; for lists of one element, which no layer changes, with the derivative zero in place of none."""
        return state if self._layers else state + 0.0 * torch.nan_to_num(x)

    def _log_identity(self, x: Tensor) -> Tensor:
        """(wires, 2n, lists): log I beside log(1 - I), for x (wires, 1, lists)."""
        one = torch.eye(self.n, dtype=torch.bool, device=x.device)
        logs = torch.zeros(self.n, 2 * self.n, dtype=x.dtype, device=x.device)
        return self._columns(logs.masked_fill(torch.cat((~one, one), -1), log_zero(x)), x)


def _apply(q: Tensor, state: Tensor, layer: Layer) -> Tensor:
    """One layer on state (wires, k, lists)."""
    first, second = split(state, layer)
    move = q * (second - first)
    return join(first + move, second - move, state, layer)


def _log_add(a: Tensor, b: Tensor) -> Tensor:
    """``log(exp a + exp b)``, with second derivatives that stay finite at any distance."""
    above = a >= b
    high, low = torch.where(above, a, b), torch.where(above, b, a)
    return high + torch.log1p(torch.exp(low - high))
