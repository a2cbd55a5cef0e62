"""Solvers and losses on shortest paths that a user would pick without this package, written as a user would."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

OFFSETS = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]


@functools.cache
def grid_edges(h: int, w: int) -> tuple[np.ndarray, np.ndarray]:
    """Tails and heads of the directed edges of a grid with 8 neighbours, ordered by tail."""
    v = np.arange(h * w).reshape(h, w)
    tails, heads = [], []
    for i, j in OFFSETS:
        part = v[max(0, -i) : h - max(0, i), max(0, -j) : w - max(0, j)].ravel()
        tails.append(part)
        heads.append(part + i * w + j)
    order = np.argsort(np.concatenate(tails), kind="stable")
    return np.concatenate(tails)[order], np.concatenate(heads)[order]


def csgraph(costs: Tensor) -> tuple[Tensor, Tensor]:
    """scipy's Dijkstra, map by map; the edge into a vertex has the vertex's cost. The graph is built once."""
    _, h, w = costs.shape
    tails, heads = grid_edges(h, w)
    first = np.searchsorted(tails, np.arange(h * w + 1))
    distances, paths = np.empty(len(costs)), np.zeros((len(costs), h * w))
    for k, c in enumerate(costs.flatten(1).double().numpy()):
        graph = scipy.sparse.csr_array((c[heads], heads, first), shape=(h * w, h * w))
        d, before = scipy.sparse.csgraph.dijkstra(graph, indices=0, return_predecessors=True)
        distances[k] = d[-1] + c[0]
        v = h * w - 1
        while v != 0:
            paths[k, v] = 1
            v = before[v]
        paths[k, 0] = 1
    return torch.from_numpy(distances), torch.from_numpy(paths).unflatten(1, (h, w))


def numpy_wavefront(costs: Tensor) -> tuple[Tensor, Tensor]:
    """Bellman-Ford by whole arrays until nothing changes, then all paths walked back together."""
    c = costs.double().numpy()
    n, h, w = c.shape
    d = np.full((n, h + 2, w + 2), np.inf)
    d[:, 1, 1] = c[:, 0, 0]
    inner = d[:, 1:-1, 1:-1]
    while True:
        rows = np.minimum(np.minimum(d[:, :-2], d[:, 1:-1]), d[:, 2:])
        new = np.minimum(inner, np.minimum(np.minimum(rows[..., :-2], rows[..., 1:-1]), rows[..., 2:]) + c)
        if (new == inner).all():
            break
        inner[:] = new
    paths, every = np.zeros((n, h, w)), np.arange(n)
    i, j = np.full(n, h - 1), np.full(n, w - 1)
    steps = np.array(OFFSETS)
    while True:
        paths[every, i, j] = 1
        away = (i > 0) | (j > 0)
        if not away.any():
            return torch.from_numpy(inner[:, -1, -1].copy()), torch.from_numpy(paths)
        around = np.stack([d[every, i + 1 + a, j + 1 + b] for a, b in OFFSETS])
        move = steps[around.argmin(0)] * away[:, None]
        i, j = i + move[:, 0], j + move[:, 1]


SOURCE = """
#include <math.h>
#include <stdint.h>
#include <string.h>
typedef struct { double d; int32_t v; } item;
/* Dijkstra as in a textbook: a binary heap; a vertex that improves is pushed again, and skipped when it is done. */
void solve(const double *costs, int64_t batch, int64_t h, int64_t w, double *distance, double *paths) {
  int64_t n = h * w;
  double d[n]; int32_t before[n]; uint8_t done[n]; item heap[8 * n + 1];
  for (int64_t b = 0; b < batch; b++) {
    const double *c = costs + b * n;
    double *path = paths + b * n;
    memset(path, 0, n * sizeof(double));
    memset(done, 0, n);
    for (int64_t v = 0; v < n; v++) d[v] = INFINITY;
    d[0] = c[0]; before[0] = -1;
    int64_t size = 0;
    heap[size++] = (item){d[0], 0};
    while (size) {
      item top = heap[0], last = heap[--size];
      int64_t i = 0, k;
      while ((k = 2 * i + 1) < size) {
        if (k + 1 < size && heap[k + 1].d < heap[k].d) k++;
        if (heap[k].d >= last.d) break;
        heap[i] = heap[k]; i = k;
      }
      heap[i] = last;
      if (done[top.v]) continue;
      done[top.v] = 1;
      if (top.v == n - 1) break;
      int64_t row = top.v / w, column = top.v % w;
      for (int64_t x = row - 1; x <= row + 1; x++)
        for (int64_t y = column - 1; y <= column + 1; y++) {
          if (x < 0 || x >= h || y < 0 || y >= w) continue;
          int64_t v = x * w + y;
          double new = top.d + c[v];
          if (done[v] || new >= d[v]) continue;
          d[v] = new; before[v] = top.v;
          int64_t j = size++;
          while (j && heap[(j - 1) / 2].d > new) { heap[j] = heap[(j - 1) / 2]; j = (j - 1) / 2; }
          heap[j] = (item){new, (int32_t)v};
        }
    }
    distance[b] = d[n - 1];
    for (int64_t v = n - 1; v >= 0; v = before[v]) path[v] = 1;
  }
}
"""


def c_dijkstra() -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
    """The reference: C, compiled here; None without gcc."""
    gcc = shutil.which("gcc")
    if gcc is None:
        return None
    folder = Path(tempfile.mkdtemp())
    (folder / "solve.c").write_text(SOURCE)
    command = [gcc, "-O3", "-march=native", "-shared", "-fPIC", "solve.c", "-o", "solve.so"]
    subprocess.run(command, cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "solve.so"))

    def solve(costs: Tensor) -> tuple[Tensor, Tensor]:
        c = costs.double().contiguous()
        distance, paths = c.new_empty(len(c)), torch.empty_like(c)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (c, distance, paths)]
        library.solve(pointers[0], *(ctypes.c_int64(k) for k in c.shape), *pointers[1:])
        return distance, paths

    return solve


def published_bellman_ford(steepness: float, iterations: int, loop: str) -> Callable[[Tensor], Tensor]:
    """Relaxed Bellman-Ford in the language of the AlgoVision package, neighbours by ``unfold``."""
    import algovision as av

    warnings.filterwarnings("ignore", message="Using a non-tuple sequence", category=UserWarning)

    def relax(d: Tensor, cost: Tensor) -> tuple[Tensor, Tensor]:
        u = torch.nn.functional.unfold(d.unsqueeze(1), 3).mT
        u = torch.cat([u[..., :4], u[..., 5:]], -1).unflatten(1, cost.shape[1:])
        weights = torch.nn.functional.softmin(steepness * u, -1)
        return torch.nn.functional.pad((weights * u).sum(-1) + cost, (1, 1, 1, 1), value=1e12), weights

    def back(place: Tensor, weights: Tensor) -> Tensor:
        h, w = place.shape[1:]
        moved = torch.nn.functional.pad(place.unsqueeze(-1) * weights, (0, 0, 1, 1, 1, 1))
        parts = [moved[:, 1 - i : 1 - i + h, 1 - j : 1 - j + w, k] for k, (i, j) in enumerate(OFFSETS)]
        return torch.stack(parts).sum(0)

    mark = av.Let("path", lambda path, place: path + place - path * place)
    move = av.Let("place", lambda place, weights: back(place, weights))
    if loop == "for":
        walk = av.For("step", iterations, mark, move)
    else:
        walk = av.While(av.LEq(lambda path: path[:, 0, 0], 1.0), mark, move)
    return av.Algorithm(
        av.Input("cost"),
        av.Var("d", lambda cost: torch.full((cost.shape[1] + 2, cost.shape[2] + 2), 1e12)),
        av.Var("weights", lambda cost: torch.zeros(*cost.shape[1:], 8)),
        av.Var("place", lambda cost: torch.zeros(cost.shape[1:])),
        av.Var("path", lambda cost: torch.zeros(cost.shape[1:])),
        av.Let("d", [1, 1], 0.0),
        av.Let("place", [-1, -1], 1.0),
        av.For("round", iterations, av.Let(["d", "weights"], lambda d, cost: relax(d, cost)), av.Let("d", [1, 1], 0.0)),
        walk,
        av.Output("path"),
        beta=steepness,
    )


def pyepo_loss(samples: int, sigma: float) -> Callable[[Tensor, Tensor], Tensor] | None:
    """PyEPO's perturbed Fenchel-Young loss over scipy's Dijkstra as its solver; None if it is not installed."""
    if importlib.util.find_spec("pyepo") is None:
        return None
    import pyepo

    class Grid(pyepo.model.opt.optModel):
        """12 x 12 vertex costs; costs that noise made negative are raised to almost 0."""

        def _getModel(self) -> tuple[None, list[int]]:
            self.modelSense = pyepo.EPO.MINIMIZE
            return None, list(range(144))

        def setObj(self, c: Any) -> None:
            self.costs = torch.as_tensor(np.asarray(c)).clamp(min=1e-9).view(1, 12, 12)

        def solve(self) -> tuple[np.ndarray, float]:
            distance, path = csgraph(self.costs)
            return path.flatten().numpy(), distance.item()

    return pyepo.func.perturbedFenchelYoung(Grid(), n_samples=samples, sigma=sigma, processes=1)
