"""Relaxed Bellman-Ford: a soft path on a grid, with a softmin in place of every minimum of the algorithm.

Bellman-Ford computes distances by rounds, ``d[v] <- c[v] + min d[u]`` over the neighbours u, and then walks back from
the goal, at every vertex to the neighbour where the minimum was. Relaxed, with steepness b (an inverse temperature)::

    w[v, u] = softmax over u of (-b d[u])        from which neighbour v is entered
    d[v]   <- c[v] + sum_u w[v, u] d[u]           d[start] = 0 always

The walk back is then a random walk that moves by the w of the last round. All its possible ways are followed at
once: ``place[v]`` is the probability of being at v, and starts as 1 at the goal. ``path[v]`` is how much v belongs to
the path, combined step by step with the "or" of independent events::

    path  <- path + place - path * place
    place <- sum_v place[v] w[v, .]

``loop="for"`` does that a fixed number of times. ``loop="while"`` does it while the start is not on the path: the
condition ``path[start] <= 1`` holds with probability ``sigmoid(b (1 - path[start]))``, and the result is the mean of
``path`` over when the loop ends.

**What the relaxation does not do.** The cost of the start is not counted; it is the same for all paths. The walk does
not stop at the start: it goes on to the start's cheapest neighbour and back. So that vertex is marked too, whether it
is on the path or not: wholly in a "for" loop, half in a "while" loop, which even a certain arrival ends only with
probability 1/2 a step. The paper does so, and so does this function, unless ``stop_at_start=True``: then what arrives
at the start is marked there and leaves the walk.

**Walls.** An infinite cost is an impassable tile. Inside it is a finite one: a path over a wall is dearer than every
path without, by so much that its softmin weight is exactly 0 in float64 (:func:`_with_walls`). A vertex behind walls,
or not reached yet, has such a distance too. So a wall leaves no trace, and every derivative stays finite.

**Layout.** Inside, the batch is the last dimension and the grid lies in a frame, so that the neighbours of all
vertices are views, without index tables or copies. Vertices that k rounds cannot reach are not computed in round k.
Where there is no neighbour the logit is -inf and the distance 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint as run_again_in_backward

from newton_plugin._errors import (
    ArgumentError,
    ArgumentTypeError,
    check_choice,
    check_floating,
    check_positive,
)
from newton_plugin.algorithms._log_domain import can_look
from newton_plugin.algorithms._shortest_paths.grid import around, check_grid

__all__ = ["relaxed_bellman_ford"]


def relaxed_bellman_ford(
    costs: Tensor,
    *,
    loop: str = "for",
    steepness: float = 10.0,
    iterations: int | None = None,
    max_steps: int | None = None,
    stop_at_start: bool = False,
    checkpoint: bool = False,
) -> Tensor:
    r"""How much each vertex belongs to the shortest path from the top left to the bottom right corner.

    Args:
        costs: (..., h, w) vertex costs, floating point; 8 neighbours. Best of the order of 1: only
            ``steepness * costs`` decides how soft the path is. A tile that costs ``inf`` is impassable: the result is
            that of the map without it, and its gradient is 0.
        loop: ``"for"`` or ``"while"``, how the path is read back (see the module's docstring).
        steepness: > 0; towards infinity the path becomes that of ``shortest_path`` where it is unique (but for the
            start's cheapest neighbour, see ``stop_at_start``).
        iterations: rounds of Bellman-Ford, and with ``"for"`` steps of the walk back: no path longer than that is
            found. Default ``h + w``; at least ``max(h, w)``, or the corners are not connected.
        max_steps: the largest number of steps of a ``"while"`` walk. Default ``2 * iterations``. All of them are
            computed: whether the loop has ended for all maps of a batch is not asked (on a GPU that would be a
            synchronisation per step).
        stop_at_start: end the walk where it arrives (see the module's docstring); False is as published.
        checkpoint: keep O(sqrt(iterations)) of the rounds for the backward pass and compute the others again there.
            For ordinary autograd, once or twice; not under ``torch.func``.

    Returns:
        path (..., h, w), in [0, 1], in the dtype of the costs. NaN costs make NaN paths.

    Losses against a true path of zeros and ones, as in the paper: ``torch.nn.functional.l1_loss(path, truth)`` and
    ``torch.nn.functional.mse_loss(path, truth)`` (squared L2). Both are smooth here: the path stays inside [0, 1].

    Raises:
        ArgumentError, ArgumentTypeError, ShapeError: an argument outside its rule.
        ArgumentError: impassable tiles leave no path of at most ``iterations`` steps. (On a device, in compiled code
            and under ``torch.func`` the host does not look: the path of this map is NaN.)

    Source: Petersen, Borgelt, Kuehne, Deussen, "Learning with algorithmic supervision via continuous relaxations",
    NeurIPS 2021, section 4; the published package ``algovision`` with the probabilistic t-conorm gives the same
    numbers (tested; its "while" loop to its threshold of 1e-5).

    Steep, it is the path:

    >>> costs = torch.tensor([[1.0, 9.0, 1.0], [1.0, 9.0, 1.0], [9.0, 1.0, 1.0]])
    >>> relaxed_bellman_ford(costs, steepness=100.0).round().int().tolist()
    [[1, 0, 0], [1, 0, 0], [0, 1, 1]]

    Soft, on a 2 x 2 map: the goal is entered from the start (distance 0), over the upper right corner (1) or over the
    lower left (3), so the walk goes to these with probabilities softmax(0, -1, -3):

    >>> path = relaxed_bellman_ford(torch.tensor([[5.0, 1.0], [3.0, 1.0]]), steepness=1.0, iterations=2)
    >>> torch.allclose(path[[0, 0, 1], [0, 1, 0]], torch.softmax(torch.tensor([0.0, -1.0, -3.0]), 0))
    True
    """
    check_floating("costs", costs)
    check_choice("loop", loop, ("for", "while"))
    steepness = check_positive("steepness", steepness, "Larger is sharper, e.g. 10.")
    check_grid(costs)
    h, w = costs.shape[-2:]
    iterations = _count("iterations", iterations, default=h + w, least=max(h, w))
    max_steps = _count("max_steps", max_steps, default=2 * iterations, least=1)
    if costs.numel() == 0:  # no maps; pad refuses these in old versions of PyTorch
        return costs.clone()
    work = costs.to(torch.float32) if costs.element_size() < 4 else costs
    c = work.unsqueeze(0).flatten(0, -3).permute(1, 2, 0).contiguous()
    c, far = _with_walls(c, iterations, steepness)
    weights, nearest = _weights(c, steepness, iterations, checkpoint)
    # A wall costs ``far`` and a path without walls at most a quarter of it. A NaN is not a wall.
    walled = torch.maximum(torch.maximum(c[0, 0], c[-1, -1]), nearest) >= far / 2
    if can_look(walled) and bool(walled.any()):
        at = tuple(walled.reshape(costs.shape[:-2]).nonzero()[0].tolist())
        which = f"the map at index {at}" if at else "this map"
        raise ArgumentError(
            f"costs must leave a path of at most iterations={iterations} steps between the corners; infinite costs are "
            f"impassable, and {which} has none. Open a tile, or give a larger iterations (a maze needs "
            "up to h * w / 2)."
        )
    if stop_at_start:
        start = torch.zeros(h, w, 1, dtype=torch.bool, device=c.device)
        start[0, 0] = True
        weights = weights.masked_fill(start, 0.0)
    if loop == "for":
        path = _walk(weights, iterations)
    else:
        path = _walk_while(weights, max_steps, steepness)
    path = path.masked_fill(walled, math.nan)
    return path.permute(2, 0, 1).reshape(costs.shape).to(costs.dtype)


def _count(name: str, value: int | None, default: int, least: int) -> int:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(f"{name} must be an integer or None; got {value!r} of type {type(value).__name__}.")
    if value < least:
        raise ArgumentError(f"{name} must be at least {least} for this map; got {value}. The default is {default}.")
    return value


def _with_walls(c: Tensor, iterations: int, steepness: float) -> tuple[Tensor, Tensor]:
    """Finite costs (h, w, B), and ``far`` (B), what a wall costs.

    A path of k steps costs between -k a and k a, where a is the largest finite cost in absolute value, and all paths
    have at most ``iterations`` steps. So over a wall it costs at least ``3/4 far``, without at most ``1/4 far``; and
    the difference is more than 800 / steepness, where ``exp(-steepness * difference)`` is 0.
    """
    passable = c < math.inf
    largest = c.detach().abs().masked_fill(~passable, 0.0).amax((0, 1))
    far = 4 * iterations * largest + 1600 / steepness
    return torch.where(passable | c.isnan(), c, far), far


def _weights(c: Tensor, steepness: float, iterations: int, checkpoint: bool) -> tuple[Tensor, Tensor]:
    """After ``iterations`` rounds, w and the least distance before the goal: costs (h, w, B) -> (3, 3, h, w, B), (B).

    w has neighbours in row-major order.
    """
    h, w, _ = c.shape
    rows, columns = torch.arange(h, device=c.device), torch.arange(w, device=c.device)
    arrival = torch.maximum(rows.unsqueeze(-1), columns).unsqueeze(-1)  # the round that first reaches a vertex
    # ... and its neighbours. 0 stands for "not a neighbour": outside, or the vertex itself.
    counted = around(arrival + 1, h, w).clone()
    counted[1, 1] = 0
    if h * w > 1:
        known = (counted > 0) & (counted <= iterations)
    else:
        known = counted == 0  # a single vertex: any weights will do, they lead nowhere
    # A round's result at the start is thrown away. All neighbours count as known there, so that it is finite.
    counted[:, :, 0, 0] = 1

    def relax(d: Tensor, first: int, last: int) -> Tensor:
        for k in range(first, last):
            # After k rounds d is known in a square of k + 1; this round adds one row and one column.
            rows, columns = min(k + 2, h), min(k + 2, w)
            near = counted[:, :, :rows, :columns]
            u = around(d, rows, columns)
            mean = (_softmin(u, (near > 0) & (near <= k + 1), steepness) * u).sum((0, 1))
            d = (mean + c[:rows, :columns]).masked_fill(arrival[:rows, :columns] == 0, 0.0)
        return d

    d, rounds = torch.zeros_like(c[:1, :1]), iterations - 1  # the last round's distances are not needed
    stride = math.isqrt(rounds) + 1 if checkpoint else max(rounds, 1)
    for first in range(0, rounds, stride):
        last = min(first + stride, rounds)
        if checkpoint:
            d = run_again_in_backward(relax, d, first, last, use_reentrant=False, preserve_rng_state=False)
        else:
            d = relax(d, first, last)
    before = d.detach()[-2:, -2:].flatten(0, 1)
    nearest = before[: max(1, len(before) - 1)].amin(0)
    return _softmin(around(d, h, w), known, steepness), nearest


def _softmin(u: Tensor, known: Tensor, steepness: float) -> Tensor:
    """Softmax of ``-steepness u`` over the known neighbours; the others have weight 0."""
    bias = torch.where(known, 0.0, -math.inf).to(u.dtype)
    return torch.softmax(torch.add(bias, u, alpha=-steepness).flatten(0, 1), 0).unflatten(0, (3, 3))


def _steps(weights: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Where the walk begins, and one step of it.

    The probability of being at v goes to v's neighbours by w[v]. So x gets place[v] w[v, x] from each neighbour v, and
    the entry of w[v] that points to x lies opposite of v's direction from x. The weights are turned once for all steps.
    """
    h, w, batch = weights.shape[2:]
    framed = pad(weights, (0, 0, 1, 1, 1, 1))
    arriving = torch.stack([framed[2 - i, 2 - j, i : i + h, j : j + w] for i in range(3) for j in range(3)])
    arriving = arriving.unflatten(0, (3, 3))
    goal = torch.zeros(h, w, 1, dtype=weights.dtype, device=weights.device)
    goal[-1, -1] = 1.0

    def step(place: Tensor) -> Tensor:
        return (arriving * around(place, h, w)).sum((0, 1))

    return goal.expand(h, w, batch), step


def _walk(weights: Tensor, steps: int) -> Tensor:
    place, step = _steps(weights)
    path = place
    for _ in range(steps - 1):
        place = step(place)
        path = torch.addcmul(path + place, path, place, value=-1)
    return path


def _walk_while(weights: Tensor, max_steps: int, steepness: float) -> Tensor:
    """The mean of ``path``, over the step after which the loop ends."""
    place, step = _steps(weights)
    path = torch.zeros_like(place)
    goes_on = torch.sigmoid(steepness * (1 - path[0, 0]))
    mean = torch.zeros_like(place)
    for k in range(max_steps):
        place = step(place) if k else place
        path = torch.addcmul(path + place, path, place, value=-1)
        condition = torch.sigmoid(steepness * (1 - path[0, 0]))
        mean = torch.addcmul(mean, goes_on * (1 - condition), path)
        goes_on = goes_on * condition
    return torch.addcmul(mean, goes_on, path)
