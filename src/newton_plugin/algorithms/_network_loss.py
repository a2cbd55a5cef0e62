r"""The ranking loss of a sorting network, with its first and second derivatives, layer by layer.

In a layer, a pair of wires with values a, b and gap = b - a sends::

    values      a' = a + h        b' = b - h        h = gap q(gap)
    log P       A' = logaddexp(log v + A, log q + B)       B' = logaddexp(log v + B, log q + A)

with one pair (A, B) for each column of P and of 1 - P. The loss is a *linear* function of the last log P and
log(1 - P), so all its curvature comes from these few operations. With an operation's adjoint (the derivative of the
loss with respect to what it gives, from one backward pass) and the tangents of what it takes (from one forward pass
with n directions), the chain rule for second derivatives is a sum over operations::

    Hessian = sum over operations of  adjoint * (second derivative of the operation)(tangent, tangent)

and the operations are two:

* ``logaddexp(own, partner)``: ``r (1 - r) D D'``, where ``r = sigmoid(partner - own)`` and D is the tangent of
  ``partner - own``. Here lies the work: n/2 pairs, 2 outputs and 2n columns a layer;
* log v, log q and h, functions of the one number gap: ``(...)'' dgap dgap'``, one term for each pair.

So nothing runs backwards n times. And as in ``_log_domain`` no two large terms cancel: each has its own size.

The steps from one layer to the next, with m the adjoint of log P and log(1 - P), x that of the values, ``-+`` for the
first and the second wire, and ``~`` for the partner::

    m  <-  m - r m + ~(r m)                                            (backwards)
    x  <-  x -+ (h' (x_a - x_b) + (log v)' sum(m - r m) + (log q)' sum(r m))
    D   =  ~T - T + (log q - log v)' dgap        T  <-  T + (log v)' dgap + r D         (forwards, T the tangent)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from newton_plugin.algorithms._layers import Layer, split
from newton_plugin.algorithms._list_loss import ListDerivatives
from newton_plugin.algorithms._log_domain import log_zero
from newton_plugin.algorithms._swaps import log_swap, log_swap_slopes, swap

__all__ = ["InChunks", "NetworkLoss", "chunk_of"]

# Elements of a state that are worked on at once: what a cache holds; on a device, what keeps it busy.
_CHUNK = {"cpu": 2**17}
_CHUNK_ELSEWHERE = 2**24


class InChunks:
    """Loss, gradient and Hessian of all lists of a batch, so many at a time that memory stays bounded.

    Args:
        part: from some of the lists to their loss and gradient, and to what gives their Hessians.
        count: of lists.
        chunk: of them at once.
    """

    def __init__(self, part: Callable[[slice], ListDerivatives], count: int, chunk: int) -> None:
        self._part = part
        self._slices = [slice(i, i + chunk) for i in range(0, max(count, 1), chunk)]
        self._kept: ListDerivatives | None = None
        results = []
        for lists in self._slices:
            done = part(lists)
            results.append((done.loss, done.gradient))
            if len(self._slices) == 1:
                self._kept = done  # the Hessian needs what is in it; of many, that would be too much to keep
        losses, gradients = zip(*results, strict=True)
        self.loss, self.gradient = torch.cat(losses), torch.cat(gradients)

    def hessian(self) -> Tensor:
        """(N, n, n), exactly symmetric."""
        parts = [(self._kept or self._part(lists)).hessian() for lists in self._slices]
        hessian = torch.cat(parts)
        return (hessian + hessian.mT) / 2


class NetworkLoss:
    """Loss, gradient and Hessian of each list.

    Args:
        values: (wires, 1, lists), the scores as they enter the network.
        logs: (wires, 2n, lists), log I beside log(1 - I).
        weights: (wires, 2n, lists): the loss is the sum of these times the last ``logs``.
        layers: of the network.
        slopes: what the gap of each pair is multiplied with before it goes into the swap: of each layer one number, or
            (blocks, step, 1, 1 or lists).
        active: for each layer which pairs do not rest, (blocks, step, 1, 1 or lists); None if all of them.
        swap_name: f.
        directions: of the Hessian, (wires, n, lists).
        restore: from a state (wires, k, lists) to lists (lists, n, k).
    """

    def __init__(
        self,
        values: Tensor,
        logs: Tensor,
        weights: Tensor,
        layers: Sequence[Layer],
        slopes: Sequence[float | Tensor],
        active: Sequence[Tensor | None],
        swap_name: str,
        directions: Tensor,
        restore: Callable[[Tensor], Tensor],
    ) -> None:
        self._layers, self._swap = layers, swap_name
        self._first = values
        gaps, self._pairs = self._run_values(values, slopes, active)
        x_per_gap = -_all_pairs(slopes, layers, gaps)
        rest = None if all(on is None for on in active) else _all_pairs(active, layers, gaps) == 0
        x = gaps * x_per_gap
        log_v, log_q = log_swap(swap_name, x)
        v1, v2, q1, q2 = log_swap_slopes(swap_name, x, log_v, log_q)
        if rest is not None:
            log_v, log_q = log_v.masked_fill(rest, 0.0), log_q.masked_fill(rest, log_zero(log_q))
            x_per_gap = x_per_gap * ~rest
        # With respect to the gap, of the pairs of all layers: (pairs, 1, lists).
        self._v1, self._q1 = v1 * x_per_gap, q1 * x_per_gap
        bend = x_per_gap * x_per_gap
        self._v2, self._q2 = v2 * bend, q2 * bend
        q = log_q.exp()
        self._h1 = q * (1 + gaps * self._q1)
        self._h2 = q * (2 * self._q1 + gaps * (self._q2 + self._q1.square()))
        self._shares: list[tuple[Tensor, Tensor]] = []  # r and 1 - r of each layer: (blocks, 2, step, 2n, lists)
        last = self._run_logs(logs, log_v, log_q)
        self.loss = (last * weights).sum((0, 1))
        """(lists,)"""
        self._adjoints: list[Tensor] = []  # of each layer, of what it gives; last layer first, like r
        gradient, self._bends = self._backward(weights)
        self.gradient = restore(gradient).squeeze(-1)
        """(lists, n)"""
        self._directions = directions

    def _run_values(
        self, values: Tensor, slopes: Sequence[float | Tensor], active: Sequence[Tensor | None]
    ) -> tuple[Tensor, list[slice]]:
        """The gaps of all pairs, layer after layer, and where each layer's are."""
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
        state = logs.clone()
        for layer, at in zip(self._layers, self._pairs, strict=True):
            pair = _pairs(state, layer)
            own = pair + log_v[at].unflatten(0, (-1, 1, layer.step))
            partner = pair.flip(1) + log_q[at].unflatten(0, (-1, 1, layer.step))
            pair.copy_(torch.logaddexp(own, partner))
            difference = partner.sub_(own)
            self._shares.append((difference.sigmoid(), difference.neg_().sigmoid_()))
        return state

    def _backward(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        m, x = weights.clone(), torch.zeros_like(self._first)
        bends = torch.empty_like(self._h2)
        for layer, at, (r, stay) in zip(*map(reversed, (self._layers, self._pairs, self._shares)), strict=True):
            pair = _pairs(m, layer)
            self._adjoints.append(pair.clone())
            moved, stayed = r * pair, stay * pair
            by_q, by_v = (both.sum((1, 3)).flatten(0, 1).unsqueeze(1) for both in (moved, stayed))
            torch.add(stayed, moved.flip(1), out=pair)
            a, b = split(x, layer)
            by_h = (a - b).flatten(0, 1)
            bends[at] = by_v * self._v2[at] + by_q * self._q2[at] + by_h * self._h2[at]
            gap = by_v * self._v1[at] + by_q * self._q1[at] + by_h * self._h1[at]
            gap = gap.unflatten(0, (-1, layer.step))
            a.sub_(gap)
            b.add_(gap)
        self._adjoints.reverse()
        return x, bends

    def hessian(self) -> Tensor:
        """(lists, n, n), symmetric up to rounding."""
        directions = self._directions
        wires, n, lists = directions.shape
        chunk = chunk_of(directions, 2 * wires * n * n)
        parts = [self._of_lists(directions, slice(i, i + chunk)) for i in range(0, lists, chunk)]
        return torch.cat(parts) if parts else directions.new_zeros(0, n, n)

    def _of_lists(self, directions: Tensor, lists: slice) -> Tensor:
        """Of some of the lists. Lists come first, then directions: what is common to all of them lies together."""
        x = directions[:, :, lists].permute(2, 1, 0).contiguous()
        count, n, wires = x.shape
        tangent = x.new_zeros(count, n, wires, self._adjoints[0].shape[3] if self._layers else 0)
        h1, v1, q1, bends = (t[:, 0, lists].t().unsqueeze(1) for t in (self._h1, self._v1, self._q1, self._bends))
        between_ways = q1 - v1
        result, gaps = x.new_zeros(count, n, n), []
        for layer, at, (r, stay), m in zip(self._layers, self._pairs, self._shares, self._adjoints, strict=True):
            each = (-1, layer.step)
            a, b = _of_lists(x, layer).unbind(3)
            gap = b - a  # (lists, n, blocks, step)
            gaps.append(gap.flatten(2, 3))
            move = h1[:, :, at].unflatten(2, each) * gap
            a.add_(move)
            b.sub_(move)
            pair = _of_lists(tangent, layer)  # (lists, n, blocks, 2, step, 2n)
            own = (between_ways[:, :, at].unflatten(2, each) * gap).unsqueeze(-1)
            between = pair[:, :, :, 1] - pair[:, :, :, 0]
            d = torch.empty_like(pair, memory_format=torch.contiguous_format)
            torch.add(own, between, out=d[:, :, :, 0])
            torch.sub(own, between, out=d[:, :, :, 1])
            pair.add_((v1[:, :, at].unflatten(2, each) * gap).unsqueeze(3).unsqueeze(-1))
            pair.addcmul_(_lists_first(r[..., lists]), d)
            root = (r[..., lists] * stay[..., lists]).mul_(-m[..., lists]).sqrt_()
            flat = d.mul_(_lists_first(root)).flatten(2)
            result.baddbmm_(flat, flat.mT, alpha=-1)
        if gaps:
            gap = torch.cat(gaps, 2)
            result.baddbmm_(bends * gap, gap.mT)
        return result


def chunk_of(like: Tensor, elements: int) -> int:
    """How many lists of so many elements each are worked on at once."""
    return max(1, _CHUNK.get(like.device.type, _CHUNK_ELSEWHERE) // max(1, elements))


def _pairs(state: Tensor, layer: Layer) -> Tensor:
    """(wires, k, lists) -> a view (blocks, 2, step, k, lists)."""
    return state.narrow(0, layer.offset, 2 * layer.pairs).unflatten(0, (-1, 2, layer.step))


def _of_lists(state: Tensor, layer: Layer) -> Tensor:
    """(lists, n, wires, ...) -> a view (lists, n, blocks, 2, step, ...)."""
    return state.narrow(2, layer.offset, 2 * layer.pairs).unflatten(2, (-1, 2, layer.step))


def _lists_first(share: Tensor) -> Tensor:
    """(blocks, 2, step, 2n, lists) -> (lists, 1, blocks, 2, step, 2n)."""
    return share.movedim(-1, 0).contiguous().unsqueeze(1)


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
