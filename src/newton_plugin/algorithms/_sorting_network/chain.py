r"""P of a sorting network: the chain of layers as one autograd.Function that works in place, forwards and backwards.

A layer is ``a' = a + q gap``, ``b' = b - q gap`` with ``gap = b - a``, for every column of the state, on a slice of one
buffer. Its matrix is symmetric, so the adjoints g go back through the same operation::

    g_a = g'_a - q e        g_b = g'_b + q e        e = g'_a - g'_b        dq = sum over columns of e gap

The adjoint of the share q goes on to the gap of the *values* on the two wires: ``q = f(-x)``, ``x = steepness gap``.
Between the passes gap and q of every layer are kept.

In short lists the values are one more column of the state. In long ones they go through the network first, in float64.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from newton_plugin._runtime.compiler import untraced
from newton_plugin.algorithms._list_loss.function import jvp_by_vjp
from newton_plugin.algorithms._log_domain import wide
from newton_plugin.algorithms._sorting_network.layers import Layer, split
from newton_plugin.algorithms._sorting_network.swaps import swap, swap_slope

__all__ = ["Chain", "Network"]


class Network(Protocol):
    """What :class:`Chain` needs of a sorting network."""

    n: int
    swap: str

    @property
    def layers(self) -> list[Layer]: ...

    @property
    def rides(self) -> bool:
        """Whether the values are one more column of the state."""
        ...

    def slopes(self, x: Tensor) -> list[float | Tensor]:
        """For each layer the factor of the gap: a number or (blocks, step, 1, 1), 0 where a pair rests."""
        ...

    def identity(self, x: Tensor) -> Tensor:
        """The first state, (wires, n, lists)."""
        ...

    def plain_chain(self, x: Tensor) -> Tensor:
        """P as a state, in ordinary operations."""
        ...


@untraced
class Chain(torch.autograd.Function):
    """``apply(x (wires, 1, lists), network) -> (P (wires, n, lists), ...)``; the other outputs are for the backward."""

    @staticmethod
    def forward(x: Tensor, network: Network) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        layers, slopes, n = network.layers, network.slopes(x), network.n
        pairs, lists = sum(layer.pairs for layer in layers), x.shape[-1]
        shares = x.new_empty(pairs, 1, lists)
        identity = network.identity(x)
        if network.rides:
            state, value_gaps = torch.cat((identity, x), 1), x.new_empty(0)
        else:
            state, value_gaps = identity.clone(memory_format=torch.contiguous_format), _values(x, network, shares)
        gaps = x.new_empty(pairs, state.shape[1], lists)
        for layer, at, slope in _along(layers, slopes):
            a, b = split(state, layer)
            gap, q = (t[at].unflatten(0, (-1, layer.step)) for t in (gaps, shares))
            torch.sub(b, a, out=gap)
            if network.rides:
                q.copy_(_share(network.swap, gap[..., n:, :], slope))
            move = q * gap
            a.add_(move)
            b.sub_(move)
        return state[:, :n], gaps, shares, value_gaps

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, ctx.network = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *output[1:])
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        if grads[0] is None:
            return None, None
        x, gaps, shares, value_gaps = ctx.saved_tensors
        network: Network = ctx.network
        if torch.is_grad_enabled():  # the gradient will be differentiated
            pull = torch.func.vjp(network.plain_chain, x)[1]
            return pull(grads[0])[0], None
        n, layers, rides = network.n, network.layers, network.rides
        g = grads[0].clone(memory_format=torch.contiguous_format)
        slopes = network.slopes(x if rides else value_gaps)
        share_slopes = _share_slopes(network.swap, gaps[:, n:] if rides else value_gaps, layers, slopes)
        if rides:
            g = torch.cat((g, g.new_zeros(g.shape[0], 1, g.shape[2])), 1)
        of_shares = []
        for layer, at, _ in reversed(_along(layers, slopes)):
            a, b = split(g, layer)
            gap, q = (t[at].unflatten(0, (-1, layer.step)) for t in (gaps, shares))
            e = a - b
            of_share = (e * gap).sum(-2, keepdim=True)
            move = q * e
            if rides:
                move[..., n:, :].add_(of_share * share_slopes[at].unflatten(0, (-1, layer.step)))
            else:
                of_shares.append(of_share)
            a.sub_(move)
            b.add_(move)
        if rides:
            return g[:, n:], None
        g = of_shares[0].new_zeros(x.shape, dtype=value_gaps.dtype) if of_shares else torch.zeros_like(x)
        for (layer, at, slope), of_share in zip(reversed(_along(layers, slopes)), of_shares, strict=True):
            a, b = split(g, layer)
            gap, share_slope = (t[at].unflatten(0, (-1, layer.step)) for t in (value_gaps, share_slopes))
            e = a - b
            move = _share(network.swap, gap, slope) * e + (of_share + e * gap) * share_slope
            a.sub_(move)
            b.add_(move)
        return g.to(x.dtype), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        return jvp_by_vjp(ctx.network.plain_chain, x, tangents[0]), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        x, network = inputs
        batch = x.movedim(in_dims[0], -1)  # lists are the last dimension
        p, *kept = Chain.apply(batch.flatten(-2), network)
        return (p.unflatten(-1, (-1, info.batch_size)), *kept), (p.ndim, None, None, None)


def _along(layers: list[Layer], slopes: list[float | Tensor]) -> list[tuple[Layer, slice, float | Tensor]]:
    """Each layer with the slice of its pairs among those of all layers, and its slope."""
    result, end = [], 0
    for layer, slope in zip(layers, slopes, strict=True):
        result.append((layer, slice(end, end + layer.pairs), slope))
        end += layer.pairs
    return result


def _share(name: str, gap: Tensor, slope: float | Tensor) -> Tensor:
    q = swap(name, gap * slope)
    return q * (slope != 0) if isinstance(slope, Tensor) else q


def _values(x: Tensor, network: Network, shares: Tensor) -> Tensor:
    """The gaps of all pairs, (pairs, 1, lists), in float64; their shares are written into ``shares``."""
    x = wide(x).clone()
    gaps = x.new_empty(shares.shape)
    for layer, at, slope in _along(network.layers, network.slopes(x)):
        a, b = split(x, layer)
        gap = b - a
        gaps[at].unflatten(0, (-1, layer.step)).copy_(gap)
        q = _share(network.swap, gap, slope)
        shares[at].unflatten(0, (-1, layer.step)).copy_(q)
        low, high = torch.lerp(a, b, q), torch.lerp(b, a, q)  # exact at q = 0 and q = 1
        a.copy_(low)
        b.copy_(high)
    return gaps


def _share_slopes(name: str, gaps: Tensor, layers: list[Layer], slopes: list[float | Tensor]) -> Tensor:
    """dq / dgap of all pairs, (pairs, 1, lists)."""
    if not any(isinstance(slope, Tensor) for slope in slopes):
        slope = slopes[0] if slopes else 0.0
        return swap_slope(name, gaps * slope) * slope
    of_pairs = torch.cat([slope.flatten(0, 1) for slope in slopes if isinstance(slope, Tensor)])
    return swap_slope(name, gaps * of_pairs) * of_pairs
