"""Random quadratic programs whose solution is known, and the obvious dense twin of solution and gradients."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

__all__ = ["Known", "known_qp", "twin"]


@dataclasses.dataclass
class Known:
    """Data and their solution: x, nu, lam meet the optimality conditions by construction."""

    data: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
    x: Tensor
    nu: Tensor
    lam: Tensor
    active: Tensor

    def leaves(self) -> list[Tensor]:
        """The data that are there, asking for gradients."""
        return [t.requires_grad_() for t in self.data if t is not None]


def known_qp(
    n: int,
    m: int = 0,
    k: int = 0,
    *,
    batch: int | None = None,
    shared: bool = False,
    active: float = 0.3,
    condition: float = 10.0,
    strictness: float = 0.1,
    seed: int = 0,
) -> Known:
    """Choose x, the multipliers and the active rows first, then p, b and h that make them optimal.

    ``strictness``: the smallest multiplier of an active row and the smallest slack of another.
    ``active``: the fraction of the k inequalities in force (never more than n - m of them).
    """
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    lead = () if batch is None else (batch,)
    own = () if shared else lead
    U = torch.linalg.qr(randn(*own, n, n)).Q
    exponent = torch.linspace(0, 1, n, dtype=torch.float64) if n > 1 else torch.zeros(1, dtype=torch.float64)
    Q = (U * condition ** (exponent - 0.5)) @ U.mT
    Q = 0.5 * (Q + Q.mT)
    A, G = randn(*own, m, n), randn(*own, k, n)
    x, nu = randn(*lead, n), randn(*lead, m)
    count = min(round(active * k), n - m)
    order = torch.rand(*lead, k, generator=g, dtype=torch.float64).argsort(-1).argsort(-1)
    is_active = order < count
    size = strictness * 10 ** (2 * torch.rand(*lead, k, generator=g, dtype=torch.float64))
    lam = torch.where(is_active, size, 0.0)
    slack = torch.where(is_active, 0.0, size)

    def mv(M: Tensor, v: Tensor) -> Tensor:
        return (M @ v.unsqueeze(-1)).squeeze(-1)

    p = -(mv(Q, x) + mv(A.mT, nu) + mv(G.mT, lam))
    b, h = mv(A, x), mv(G, x) + slack
    data = (Q, p, A if m else None, b if m else None, G if k else None, h if k else None)
    return Known(data, x, nu, lam, is_active)


def twin(known: Known, weights: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """x and the gradients of ``sum(weights * (x, nu, lam))``, one problem at a time: a dense linear solve.

    The solve is refined with residuals in extended precision, so that the twin is right to the last digits.
    """
    import numpy as np

    def one(t: Tensor | None, i: int | None, ndim: int) -> np.ndarray | None:
        if t is None:
            return None
        return (t if i is None or t.ndim == ndim else t[i]).detach().numpy()

    batch = known.x.shape[0] if known.x.ndim == 2 else None
    xs = []
    grads = [None if t is None else np.zeros(t.shape) for t in known.data]
    for i in [None] if batch is None else range(batch):
        Q, p, A, b, G, h = (one(t, i, d) for t, d in zip(known.data, (2, 1, 2, 1, 2, 1), strict=True))
        n = len(p)
        act = one(known.active, i, 1)
        gx, gnu, glam = (one(t, i, 1) for t in weights)
        A, b = (np.zeros((0, n)), np.zeros(0)) if A is None else (A, b)
        G, h = (np.zeros((0, n)), np.zeros(0)) if G is None else (G, h)
        m, W = len(b), np.concatenate([A, G[act]])
        f = len(W)
        K = np.block([[Q, W.T], [W, np.zeros((f, f))]])

        def solve(right: np.ndarray, K: np.ndarray = K) -> np.ndarray:
            u = np.linalg.solve(K, right).astype(np.longdouble)
            for _ in range(3):
                u = u + np.linalg.solve(K, (right - K.astype(np.longdouble) @ u).astype(float))
            return u.astype(float)

        u = solve(np.concatenate([-p, b, h[act]]))
        v = solve(np.concatenate([gx, gnu, glam[act]]))
        x, y, vx, vy = u[:n], u[n:], v[:n], v[n:]
        xs.append(x)
        lam, vlam = np.zeros(len(h)), np.zeros(len(h))
        lam[act], vlam[act] = y[m:], vy[m:]
        own = (
            -0.5 * (np.outer(vx, x) + np.outer(x, vx)),
            -vx,
            -(np.outer(y[:m], vx) + np.outer(vy[:m], x)),
            vy[:m],
            -(np.outer(lam, vx) + np.outer(vlam, x)),
            vlam,
        )
        for total, part, base in zip(grads, own, (2, 1, 2, 1, 2, 1), strict=True):
            if total is not None:
                if i is None or total.ndim == base:
                    total += part
                else:
                    total[i] += part
    x = torch.as_tensor(np.stack(xs) if batch is not None else xs[0])
    return x, [torch.as_tensor(g) for g in grads if g is not None]
