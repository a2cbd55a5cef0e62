r"""Which rows are active: block principal pivoting for one problem, compiled.

The method, the exchange rule and the tolerances are those of ``_active_set/pivoting.py``. Where pivoting gives up,
``dual.py`` takes over.
"""

from __future__ import annotations

import numpy as np

from newton_plugin.convex._compiled.jit import subroutine
from newton_plugin.convex._compiled.linear import clear, count_up
from newton_plugin.convex._compiled.rows import at_rows, enter_pool, extend_factor

__all__ = ["deepest", "pivot"]

_ROUNDS = 40
_PATIENCE = 3  # rounds without fewer wrong rows, after which single rows change sides
_SHARE = 0.3  # rows enter that are violated by at least this share of the worst


@subroutine
def pivot(program, start, pool, working, scratch):
    """Guess the active rows until none is wrong. Returns f: they are rows[:f]; -1 if it gives up."""
    m, count = program.A.shape[0], program.c.size
    held = count if pool.shared else 0
    f, known, fewest, patience = 0, 0, count + 1, _PATIENCE
    entering = _first_guess(program, start, working, scratch.new)
    for _ in range(_ROUNDS):
        if f + entering > working.R.shape[0]:
            return -1
        missing = _enter(pool, working, scratch.new, f, entering)
        if missing:
            enter_pool(program, pool, scratch.new, missing, held)
            held += missing
        f += entering
        if not extend_factor(pool, working, known, f):
            return -1
        at_rows(program, start, pool, working, f, scratch)
        negative = -start.tolerance * _forces(start, pool, working, f, scratch)
        wrong, last = _count_wrong(start, working, f, scratch, negative, m)
        if wrong == 0:
            return f
        patience = _PATIENCE if wrong < fewest else patience - 1
        fewest = min(fewest, wrong)
        alone = -1 if patience >= 0 else last
        entering = _select_entering(program, start.limit, working.inside, scratch.slack, alone, scratch.new, m)
        f, known = _remove_leaving(working, f, scratch.force, negative, alone, m)
    return -1


@subroutine
def deepest(length, inside, slack, limit, m):
    """The depth of the most violated inequality, in units of x, and its row; 0 and -1 if there is none."""
    depth, row = 0.0, -1
    for r in range(m, length.size):
        if not inside[r] and slack[r] < -limit[r] and slack[r] / max(length[r], 1e-300) < depth:
            depth, row = slack[r] / max(length[r], 1e-300), r
    return depth, row


@subroutine
def _first_guess(program, start, working, new):
    """The equalities, or, if there are none, the rows most violated at the start. How many are in ``new``."""
    m, inside = program.A.shape[0], working.inside
    clear(inside, inside.size)
    if m == 0:
        return _select_entering(program, start.limit, inside, start.slack, -1, new, 0)
    count_up(new, m)
    return m


@subroutine
def _enter(pool, working, new, f, entering):
    """Put rows new[:entering] behind rows[:f]. How many of them the pool lacks; these are first in ``new``."""
    rows, inside, slot = working.rows, working.inside, pool.slot
    w = 0
    for t in range(entering):
        r = new[t]
        rows[f + t], inside[r] = r, 1
        if slot[r] < 0:
            new[w] = r
            w += 1
    return w


@subroutine
def _forces(start, pool, working, f, scratch):
    """Multipliers times the lengths of their whitened rows, in units of the gradient; returns their scale."""
    S, slot, rows, y, force = pool.S, pool.slot, working.rows, scratch.y, scratch.force
    scale = start.descent
    for t in range(f):
        r = slot[rows[t]]
        force[t] = y[t] * np.sqrt(S[r, r])
        scale = max(scale, abs(force[t]))
    return scale


@subroutine
def _count_wrong(start, working, f, scratch, negative, m):
    """How many inequalities are on the wrong side, and the last of them."""
    rows, inside, slack, force, limit = working.rows, working.inside, scratch.slack, scratch.force, start.limit
    wrong, last = 0, -1
    for t in range(f):
        if rows[t] >= m and force[t] < negative:
            wrong += 1
            last = max(last, rows[t])
    for r in range(m, inside.size):
        if not inside[r] and slack[r] < -limit[r]:
            wrong += 1
            last = max(last, r)
    return wrong, last


@subroutine
def _select_entering(program, limit, inside, slack, alone, new, m):
    """Which rows enter: those violated by a share of the worst, or ``alone``, if it is not -1. How many."""
    length = program.length
    depth, _ = deepest(length, inside, slack, limit, m)
    entering = 0
    for r in range(m, length.size):
        violated = not inside[r] and slack[r] < -limit[r]
        if violated and (slack[r] / max(length[r], 1e-300) <= _SHARE * depth if alone < 0 else r == alone):
            new[entering] = r
            entering += 1
    return entering


@subroutine
def _remove_leaving(working, f, force, negative, alone, m):
    """Take rows with a negative multiplier out of rows[:f], or ``alone`` only. What is left, and what R still holds."""
    rows, inside = working.rows, working.inside
    kept, known = 0, f
    for t in range(f):
        r = rows[t]
        if r >= m and force[t] < negative and (alone < 0 or r == alone):
            inside[r] = 0
            known = min(known, kept)
        else:
            rows[kept] = r
            kept += 1
    return kept, known
