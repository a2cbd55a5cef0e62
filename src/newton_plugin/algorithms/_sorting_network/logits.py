r"""log P of a sorting network as a function of the scores, with its first and second derivatives, layer by layer.

In a layer, a pair of wires with values a, b and gap = b - a sends::

    values      a' = a + h        b' = b - h        h = gap q(gap)
    log P       A' = logaddexp(log v + A, log q + B)       B' = logaddexp(log v + B, log q + A)

with one pair (A, B) for each column of P. The rows of the last log P are logits, ``P = softmax(log P)``;
``_list_loss/row_loss.py`` has the loss of the logits and its derivatives. Let g be its gradient in the logits. The
second derivatives of the logits themselves come from the few operations above. With an operation's adjoint (from one
backward pass) and the tangents of its inputs (from one forward pass with n directions), the chain rule for second
derivatives is a sum over operations::

    sum_ij g_ij d2 log P_ij = sum over operations of  adjoint * (second derivative of the operation)(tangent, tangent)

and the operations are two:

* ``logaddexp(own, partner)``: ``r (1 - r) D D'``, where ``r = sigmoid(partner - own)`` and D is the tangent of
  ``partner - own``. This is most of the work: n/2 pairs, 2 outputs and n columns a layer;
* log v, log q and h, functions of the one number gap: ``(...)'' dgap dgap'``, one term for each pair.

So there is no need for n backward passes. And as in ``_log_domain.py`` no large terms cancel.

The steps from one layer to the next, with m the adjoint of log P, x that of the values, ``-+`` for the first and the
second wire, and ``~`` for the partner::

    m  <-  m - r m + ~(r m)                                            (backwards)
    x  <-  x -+ (h' (x_a - x_b) + (log v)' sum(m - r m) + (log q)' sum(r m))
    D   =  ~T - T + (log q - log v)' dgap        T  <-  T + (log v)' dgap + r D         (forwards, T the tangent)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from newton_plugin.algorithms._list_loss.chunks import chunk_of
from newton_plugin.algorithms._log_domain import log_zero
from newton_plugin.algorithms._sorting_network.layers import Layer, split
from newton_plugin.algorithms._sorting_network.swaps import log_swap, log_swap_slopes, swap

__all__ = ["NetworkLogits"]


class NetworkLogits:
    """:class:`~newton_plugin.algorithms._list_loss.row_logits.RowLogits` of a network, for lists (lists, n).

    Args:
        values: (wires, 1, lists), the scores as they enter the network.
        logs: (wires, n, lists), log I.
        layers: of the network.
        slopes: for each layer the factor of the gap in a swap: one number, or (blocks, step, 1, 1 or lists).
        active: for each layer which pairs do not rest, (blocks, step, 1, 1 or lists); None if none rests.
        swap_name: f.
        directions: of the tangents, (wires, n, lists).
        to_state: from lists (lists, n, k) to a state (wires, k, lists), 0 on wires that hold no element of a list.
        to_lists: from a state (wires, k, lists) to lists (lists, n, k).
    """

    def __init__(
        self,
        values: Tensor,
        logs: Tensor,
        layers: Sequence[Layer],
        slopes: Sequence[float | Tensor],
        active: Sequence[Tensor | None],
        swap_name: str,
        directions: Tensor,
        to_state: Callable[[Tensor], Tensor],
        to_lists: Callable[[Tensor], Tensor],
    ) -> None:
        self._layers, self._swap, self._directions = layers, swap_name, directions
        self._to_state, self._to_lists = to_state, to_lists
        gaps, self._pairs = self._run_values(values, slopes, active)
        x_per_gap = -_all_pairs(slopes, layers, gaps)
        rest = None if all(on is None for on in active) else _all_pairs(active, layers, gaps) == 0
        x = gaps * x_per_gap
        log_v, log_q = log_swap(swap_name, x)
        v1, v2, q1, q2 = log_swap_slopes(swap_name, x, log_v, log_q)
        if rest is not None:
            log_v, log_q = log_v.masked_fill(rest, 0.0), log_q.masked_fill(rest, log_zero(log_q))
            x_per_gap = x_per_gap * ~rest
        # First and second derivatives of log q, log v and h in the gap, for the pairs of all layers: (3, pairs, lists).
        self._first = torch.stack((q1 * x_per_gap, v1 * x_per_gap, torch.empty_like(q1))).squeeze(2)
        squared = (x_per_gap * x_per_gap).squeeze(1)
        self._second = torch.stack((q2.squeeze(1) * squared, v2.squeeze(1) * squared, torch.empty_like(self._first[2])))
        q, gaps = log_q.squeeze(1).exp(), gaps.squeeze(1)
        self._first[2] = q * (1 + gaps * self._first[0])
        self._second[2] = q * (2 * self._first[0] + gaps * (self._second[0] + self._first[0].square()))
        # For each layer r and 1 - r, (2, blocks, 2, step, n, lists); :meth:`pull` makes the second r (1 - r) adjoint.
        self._shares: list[Tensor] = []
        self._weighted_second = squared.new_zeros(0)
        self.z = to_lists(self._run_logs(logs, log_v, log_q))
        """(lists, n, n)"""
        self._wires: Tensor | None = None
        if rest is not None:  # the wires on which the elements of each list come out, (lists, n)
            wires = torch.arange(values.shape[0], dtype=values.dtype, device=values.device)
            self._wires = to_lists(wires.view(-1, 1, 1).expand_as(values)).squeeze(-1).long()
        self.at_once = chunk_of(directions, directions.shape[0] * directions.shape[1] ** 2)

    def _run_values(
        self, values: Tensor, slopes: Sequence[float | Tensor], active: Sequence[Tensor | None]
    ) -> tuple[Tensor, list[slice]]:
        """The gaps of all pairs, layer after layer, and the slice of each layer."""
        x, gaps, pairs, end = values.clone(), [], [], 0
        for layer, slope, on in zip(self._layers, slopes, active, strict=True):
            a, b = split(x, layer)
            gap = b - a
            move = swap(self._swap, gap * slope) * gap
            if on is not None:
                move = move * on
            a.add_(move)
            b.sub_(move)
            gaps.append(gap.flatten(0, 1))
            pairs.append(slice(end, end + layer.pairs))
            end += layer.pairs
        return torch.cat(gaps), pairs

    def _run_logs(self, logs: Tensor, log_v: Tensor, log_q: Tensor) -> Tensor:
        """The last log P. The error of a step is the rounding of 1, and a softmax of log P needs no smaller one."""
        state = logs.clone(memory_format=torch.contiguous_format)
        buffer, least = torch.empty_like(state), _least(state)
        furthest = -math.log(least)
        for layer, at in zip(self._layers, self._pairs, strict=True):
            pair, partner = _pairs(state, layer), _pairs(buffer, layer)
            stays, moves = (log[at].view(layer.blocks, layer.step, 1, log.shape[-1]) for log in (log_v, log_q))
            torch.add(pair[:, 1], moves, out=partner[:, 0])
            torch.add(pair[:, 0], moves, out=partner[:, 1])
            pair.add_(stays.unsqueeze(1))
            shares = pair.new_empty(2, *pair.shape)
            r, stay = shares.unbind(0)
            torch.sub(partner, pair, out=r).clamp_(-furthest, furthest)
            torch.neg(r, out=stay)
            torch.maximum(pair, partner, out=pair)
            torch.threshold_(shares.sigmoid_(), least, 0.0)  # subnormal numbers are slow
            pair.sub_(torch.maximum(r, stay, out=partner).log_())
            self._shares.append(shares)
        return state

    def columns(self, matrix: Tensor) -> Tensor:
        return matrix

    def pull(self, gradient: Tensor) -> Tensor:
        """``sum_ik gradient_ik J_ik``. Call it once: it stores what :meth:`part` needs."""
        m = self._to_state(gradient).contiguous()
        x, buffer = torch.zeros_like(self._directions[:, 0]), m.new_empty(2 * m.numel())
        arrived = torch.empty_like(self._first)
        for k in reversed(range(len(self._layers))):
            layer, at, shares = self._layers[k], self._pairs[k], self._shares[k]
            if k % 4 == 3:
                m = torch.hardshrink(m, _least(m))  # against subnormal numbers
            pair = _pairs(m, layer)
            both = torch.mul(shares, pair, out=buffer[: shares.numel()].view_as(shares))
            moved, stayed = both.unbind(0)
            shares[1].mul_(moved)
            torch.add(stayed[:, 0], moved[:, 1], out=pair[:, 0])
            torch.add(stayed[:, 1], moved[:, 0], out=pair[:, 1])
            a, b = split(x, layer)
            here = arrived[:, at].view(3, layer.blocks, layer.step, arrived.shape[-1])
            torch.sum(both, (2, 4), out=here[:2])
            torch.sub(a, b, out=here[2])
            gap = (here * self._first[:, at].view_as(here)).sum(0)
            a.sub_(gap)
            b.add_(gap)
        self._weighted_second = arrived.mul_(self._second).sum(0)
        return self._to_lists(x.unsqueeze(1)).squeeze(-1)

    def part(self, lists: slice) -> _LinearLogits:
        """The derivatives of these lists. Lists and directions come first here, so that a direction is contiguous."""
        x = self._directions[:, :, lists].permute(2, 1, 0).contiguous()
        count, n, wires = x.shape
        q1, v1, h1 = self._first[:, :, lists].mT.unsqueeze(2).unbind(0)
        gaps = x.new_empty(count, n, q1.shape[-1])
        for layer, at in zip(self._layers, self._pairs, strict=True):
            a, b = _of_lists(x, layer).unbind(3)
            gap = torch.sub(b, a, out=gaps[:, :, at].unflatten(2, (-1, layer.step)))
            move = h1[:, :, at].unflatten(2, (-1, layer.step)) * gap
            a.add_(move)
            b.sub_(move)
        second = (gaps * self._weighted_second[:, lists].t().unsqueeze(1)) @ gaps.mT
        between_ways, stays = ((t * gaps).unsqueeze(-1) for t in (q1 - v1, v1))
        tangent = x.new_zeros(count, n, wires, n)
        buffers = tangent.new_empty(2, tangent.numel())
        for layer, at, shares in zip(self._layers, self._pairs, self._shares, strict=True):
            own, stay = (t[:, :, at].unflatten(2, (-1, layer.step)) for t in (between_ways, stays))
            pair = _of_lists(tangent, layer)  # (lists, n, blocks, 2, step, n)
            d, weighted = (buffer[: pair.numel()].view(pair.shape) for buffer in buffers)
            between = torch.sub(pair[:, :, :, 1], pair[:, :, :, 0], out=d[:, :, :, 0])
            torch.sub(own, between, out=d[:, :, :, 1])
            between.add_(own)
            r, weight = shares[..., lists].movedim(-1, 1).contiguous().unsqueeze(2).unbind(0)
            pair.add_(stay.unsqueeze(3)).addcmul_(r, d)
            torch.mul(d, weight, out=weighted)
            second.baddbmm_(weighted.flatten(2), d.flatten(2).mT)
        if self._wires is not None:
            tangent = torch.take_along_dim(tangent, self._wires[lists, None, :, None], 2)
        return _LinearLogits(tangent.permute(0, 2, 3, 1).contiguous(), (second + second.mT) / 2)


class _LinearLogits:
    """The derivatives of some lists' logits.

    Args:
        jacobian: J, (lists, n, n, n).
        second: ``sum_ik gradient_ik d2 z_ik / ds2``, (lists, n, n).
    """

    def __init__(self, jacobian: Tensor, second: Tensor) -> None:
        self._jacobian, self._second = jacobian, second

    def combine(self, weights: Tensor) -> Tensor:
        return (weights.movedim(1, 2) @ self._jacobian).movedim(2, 1)

    def rows(self, index: Tensor) -> Tensor:
        return torch.take_along_dim(self._jacobian, index.unsqueeze(-1), 2).squeeze(2)

    def outer(self, index: Tensor, right: Tensor) -> Tensor:
        return self.rows(index).mT @ right

    def squares(self, weights: Tensor) -> Tensor:
        flat = self._jacobian.flatten(1, 2)
        half = (flat * weights.flatten(1).unsqueeze(-1)).mT @ flat
        return (half + half.mT) / 2

    def second_derivative(self, gradient: Tensor) -> Tensor | None:
        return self._second

    def restore(self, hessian: Tensor) -> Tensor:
        return hessian


def _least(like: Tensor) -> float:
    """The least number that is computed with; its products with a few factors are not subnormal."""
    return torch.finfo(like.dtype).tiny / torch.finfo(like.dtype).eps


def _pairs(state: Tensor, layer: Layer) -> Tensor:
    """(wires, k, lists) -> a view (blocks, 2, step, k, lists)."""
    return state.narrow(0, layer.offset, 2 * layer.pairs).view(layer.blocks, 2, layer.step, *state.shape[1:])


def _of_lists(state: Tensor, layer: Layer) -> Tensor:
    """(lists, n, wires, ...) -> a view (lists, n, blocks, 2, step, ...)."""
    return state.narrow(2, layer.offset, 2 * layer.pairs).unflatten(2, (-1, 2, layer.step))


def _all_pairs(values: Sequence[float | Tensor | None], layers: Sequence[Layer], gaps: Tensor) -> Tensor:
    """A number or tensor (blocks, step, 1, 1 or lists) for each layer -> (pairs, 1, 1 or lists); None is 1."""
    parts = [
        v.flatten(0, 1).to(gaps.dtype)
        if isinstance(v, Tensor)
        else gaps.new_full((layer.pairs, 1, 1), 1.0 if v is None else v)
        for v, layer in zip(values, layers, strict=True)
    ]
    width = max((part.shape[-1] for part in parts), default=1)
    return torch.cat([part.expand(-1, -1, width) for part in parts])
