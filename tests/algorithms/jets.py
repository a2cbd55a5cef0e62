"""Numbers that carry their gradient and Hessian, in mpmath: exact derivatives of obvious formulas.

``Jet(v, g, H)`` follows the chain rule and nothing else. With 80 digits and exponents without bounds, the
textbook formula can be written down as in the paper and still be right where float64 is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mpmath as mp

from newton_plugin.algorithms._sorting_network.layers import schedule

mp.mp.dps = 80


class Jet:
    """A value with gradient (m) and Hessian (m x m, lower triangle) with respect to m inputs."""

    __slots__ = ("g", "h", "v")

    def __init__(self, v, g, h):
        self.v, self.g, self.h = v, g, h

    def _lift(self, other):
        if isinstance(other, Jet):
            return other
        m = len(self.g)
        return Jet(mp.mpf(other), [mp.mpf(0)] * m, [[mp.mpf(0)] * (i + 1) for i in range(m)])

    def map(self, v, d, dd) -> Jet:
        """f(self), given f, f', f'' at the value."""
        m = len(self.g)
        g = [d * a for a in self.g]
        h = [[d * self.h[i][j] + dd * self.g[i] * self.g[j] for j in range(i + 1)] for i in range(m)]
        return Jet(v, g, h)

    def __add__(self, other):
        o = self._lift(other)
        g = [a + b for a, b in zip(self.g, o.g, strict=True)]
        h = [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(self.h, o.h, strict=True)]
        return Jet(self.v + o.v, g, h)

    __radd__ = __add__

    def __neg__(self):
        return Jet(-self.v, [-a for a in self.g], [[-a for a in row] for row in self.h])

    def __sub__(self, other):
        return self + (-self._lift(other))

    def __rsub__(self, other):
        return (-self) + other

    def __mul__(self, other):
        if not isinstance(other, Jet):
            c = mp.mpf(other)
            return Jet(c * self.v, [c * a for a in self.g], [[c * a for a in row] for row in self.h])
        o, m = other, len(self.g)
        g = [self.v * b + o.v * a for a, b in zip(self.g, o.g, strict=True)]
        h = [
            [self.v * o.h[i][j] + o.v * self.h[i][j] + self.g[i] * o.g[j] + self.g[j] * o.g[i] for j in range(i + 1)]
            for i in range(m)
        ]
        return Jet(self.v * o.v, g, h)

    __rmul__ = __mul__

    def __truediv__(self, other):
        if isinstance(other, Jet):
            return self * other.map(1 / other.v, -1 / other.v**2, 2 / other.v**3)
        return self * (1 / mp.mpf(other))

    def __abs__(self):
        s = mp.sign(self.v)  # 0 at 0: the mean of both sides
        return self.map(abs(self.v), s, 0)


def exp(x: Jet) -> Jet:
    e = mp.exp(x.v)
    return x.map(e, e, e)


def log(x: Jet) -> Jet:
    return x.map(mp.log(x.v), 1 / x.v, -1 / x.v**2)


def total(jets: Sequence[Jet]) -> Jet:
    out = jets[0]
    for jet in jets[1:]:
        out = out + jet
    return out


def inputs(values: Sequence[float]) -> list[Jet]:
    """One jet per input; floats enter exactly."""
    m = len(values)
    return [
        Jet(
            mp.mpf(v),
            [mp.mpf(int(i == k)) for k in range(m)],
            [[mp.mpf(0)] * (a + 1) for a in range(m)],
        )
        for i, v in enumerate(values)
    ]


def bce(p: Callable[[list[Jet]], list[list[Jet]]], scores: Sequence[float], ranks: Sequence[int]):
    """Value, gradient and Hessian of the ranking loss, from P alone; 1 - P sums the rest of the row."""
    n = len(scores)
    rows = p(inputs(scores))
    terms = []
    for i in range(n):
        for j in range(n):
            if ranks[j] == i:
                terms.append(-log(rows[i][j]))
            else:
                terms.append(-log(total([rows[i][k] for k in range(n) if k != j])))
    loss = total(terms) / (n * n)
    hessian = [[loss.h[max(i, j)][min(i, j)] for j in range(n)] for i in range(n)]
    return loss.v, loss.g, hessian


def neural_sort(temperature: float) -> Callable[[list[Jet]], list[list[Jet]]]:
    def p(s: list[Jet]) -> list[list[Jet]]:
        n = len(s)
        rows = []
        for i in range(n):
            spread = [total([abs(a - b) for b in s]) for a in s]
            z = [((2 * i + 1 - n) * s[j] - spread[j]) / temperature for j in range(n)]
            e = [exp(x) for x in z]
            norm = total(e)
            rows.append([x / norm for x in e])
        return rows

    return p


def soft_sort(temperature: float, power: int) -> Callable[[list[Jet]], list[list[Jet]]]:
    def p(s: list[Jet]) -> list[list[Jet]]:
        rows = []
        for a in sorted(s, key=lambda jet: jet.v):  # stable: the first of tied elements comes first
            distances = [abs(a - b) if power == 1 else (a - b) * (a - b) for b in s]
            e = [exp(-d / temperature) for d in distances]
            norm = total(e)
            rows.append([x / norm for x in e])
        return rows

    return p


def _normal(x):
    return mp.erfc(-x / mp.sqrt(2)) / 2


def _optimal(x):
    if abs(x) <= mp.mpf(1) / 4:
        return mp.mpf(1) / 2 + x, mp.mpf(1), mp.mpf(0)
    return (1 if x > 0 else 0) - 1 / (16 * x), 1 / (16 * x**2), -1 / (8 * x**3)


# f, f', f'' at x, from the definitions
SWAPS = {
    "logistic": lambda x: (
        1 / (1 + mp.exp(-x)),
        mp.exp(-abs(x)) / (1 + mp.exp(-abs(x))) ** 2,
        -mp.tanh(x / 2) * mp.exp(-abs(x)) / (1 + mp.exp(-abs(x))) ** 2,
    ),
    "cauchy": lambda x: (
        mp.mpf(1) / 2 + mp.atan(x) / mp.pi,
        1 / (mp.pi * (1 + x**2)),
        -2 * x / (mp.pi * (1 + x**2) ** 2),
    ),
    "gaussian": lambda x: (_normal(x), mp.npdf(x), -x * mp.npdf(x)),
    "reciprocal": lambda x: (
        (1 + x / (2 + abs(x))) / 2,
        1 / (2 + abs(x)) ** 2,
        -2 * mp.sign(x) / (2 + abs(x)) ** 3,
    ),
    "optimal": _optimal,
}


def sorting_network(layout: str, swap: str, steepness: float) -> Callable[[list[Jet]], list[list[Jet]]]:
    def p(s: list[Jet]) -> list[list[Jet]]:
        n = len(s)
        x = list(s)
        rows = [[s[0] * 0 + int(i == j) for j in range(n)] for i in range(n)]
        resting, layers = schedule(n, layout)
        for layer in layers:
            for first, second, direction in layer.wires():
                if direction == 0:
                    continue
                a, b = (w - resting for w in (first, second)[::direction])
                gap = steepness * (x[b] - x[a])
                v, q = gap.map(*SWAPS[swap](gap.v)), (-gap).map(*SWAPS[swap](-gap.v))
                x[a], x[b] = v * x[a] + q * x[b], q * x[a] + v * x[b]
                low = [v * i + q * j for i, j in zip(rows[a], rows[b], strict=True)]
                high = [q * i + v * j for i, j in zip(rows[a], rows[b], strict=True)]
                rows[a], rows[b] = low, high
        return rows

    return p
