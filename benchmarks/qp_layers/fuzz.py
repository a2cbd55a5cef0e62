"""Random programs of many classes: how many answers are wrong, and how many programs are refused, beside the peers.

    python -m benchmarks.qp_layers.fuzz [--count 360] [--seed 0] [--methods ours qpth ...] [--docs]

Each class of ``programs.py`` gives ``--count`` programs. *Wrong*: the solver returns an x without a complaint, and x
misses a row by more than 1e-6 (float32: 1e-4) in natural units, or its objective is too high by as much relative to its
terms, or the program has no feasible point (``conditions.py``, Clarabel at 1e-11 being the truth). *Refused*: an error,
a NaN or a status, though Clarabel solves the program. The peers run at their defaults, as in ``peers.py``; a peer that
takes no program without equalities gets one that says 0 = 0. ``--docs`` writes the table of docs/convex.md.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from benchmarks.qp_layers.conditions import is_wrong, truth
from benchmarks.qp_layers.programs import CLASSES, Program, draw
from benchmarks.tables import markdown
from torch import Tensor

DOCS = Path(__file__).parents[2] / "docs" / "convex.md"
MARKS = "<!-- table by python -m benchmarks.qp_layers.fuzz -->\n\n", "\n\n<!-- end of the fuzz table -->"
TOLERANCE = {"float64": 1e-6, "float32": 1e-4}
Method = Callable[[Program], Tensor]


def ours(program: Program) -> Tensor:
    from newton_plugin.convex import solve_qp

    return solve_qp(*program.tensors()).x  # type: ignore[arg-type]


def ours_sparse(program: Program) -> Tensor:
    from newton_plugin.convex import solve_qp

    Q, p, A, b, G, h = program.tensors()
    sparse = [None if t is None else t.to_sparse() for t in (Q, A, G)]
    return solve_qp(sparse[0], p, sparse[1], b, sparse[2], h).x  # type: ignore[arg-type]


def _full(program: Program, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """All six tensors: constraints that are not there become a row of zeros (0 = 0, 0 <= 1)."""
    Q, p, A, b, G, h = (torch.from_numpy(part) for part in program.rounded())
    if not len(b):
        A, b = A.new_zeros(1, len(p)), b.new_zeros(1)
    if not len(h):
        G, h = G.new_zeros(1, len(p)), h.new_ones(1)
    return {k: t.to(dtype or t.dtype) for k, t in zip("QpAbGh", (Q, p, A, b, G, h), strict=True)}


def qpth(program: Program) -> Tensor:
    from qpth.qp import QPFunction

    Q, p, A, b, *_ = program.tensors()
    none = torch.empty(0, dtype=p.dtype)  # type: ignore[union-attr]
    t = _full(program)
    A, b = (none, none) if A is None else (A, b)
    return QPFunction(verbose=-1)(Q, p, t["G"], t["h"], A, b)[0]


def qplayer(program: Program) -> Tensor:
    from proxsuite.torch.qplayer import QPFunction

    t = _full(program, torch.float64)
    below = torch.full_like(t["h"], -1e20)
    return QPFunction(omp_parallel=False)(*(t[k] for k in ("Q", "p", "A", "b", "G")), below, t["h"])[0].flatten()


def moreau(program: Program) -> Tensor:
    import moreau
    from moreau.torch import Solver

    t = _full(program, torch.float64)
    n, e, m = len(t["p"]), len(t["b"]), len(t["h"])

    def dense(rows: int) -> tuple[Tensor, Tensor]:
        return torch.arange(0, (rows + 1) * n, n), torch.arange(n).repeat(rows)

    settings = moreau.Settings(device="cpu", batch_size=1)
    cones = moreau.Cones(num_zero_cones=e, num_nonneg_cones=m)
    solver = Solver(n, e + m, *dense(n), *dense(e + m), cones, settings)
    C, d = torch.cat((t["A"], t["G"])), torch.cat((t["b"], t["h"]))
    answer = solver.solve(t["Q"].reshape(1, -1), C.reshape(1, -1), t["p"][None], d[None])
    solved = "Solved" in str(solver.info.status)  # a status, no error
    return answer.x[0] if solved else torch.full_like(t["p"], torch.nan)


METHODS: dict[str, Method] = {
    "ours": ours,
    "ours, sparse": ours_sparse,
    "qpth": qpth,
    "QPLayer": qplayer,
    "moreau": moreau,
}


def count(name: str, seeds: range, methods: dict[str, Method]) -> dict[str, str]:
    """One row of the table."""
    wrong, refused = dict.fromkeys(methods, 0), dict.fromkeys(methods, 0)
    for seed in seeds:
        program = draw(name, seed)
        right = truth(program)
        for method, solve in methods.items():
            x = _answer(solve, program)
            if x is None:
                refused[method] += right.solved
            else:
                wrong[method] += is_wrong(program, right, x, TOLERANCE[program.dtype])
    return {"class": name, "programs": str(len(seeds))} | {m: f"{wrong[m]} / {refused[m]}" for m in methods}


def _answer(solve: Method, program: Program) -> np.ndarray | None:
    """x, or None where the solver gives up."""
    quiet = contextlib.redirect_stdout(io.StringIO())
    try:
        with quiet, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x = solve(program).detach().double().numpy()
    except Exception:  # each peer has errors of its own
        return None
    return x if np.isfinite(x).all() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=360)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--docs", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    methods = {name: METHODS[name] for name in args.methods}
    rows = []
    for name in CLASSES:
        rows.append(count(name, range(args.seed, args.seed + args.count), methods))
        print(rows[-1], flush=True)
    sums = {m: [sum(int(row[m].split(" / ")[i]) for row in rows) for i in (0, 1)] for m in methods}
    total = {"class": "**all**", "programs": str(args.count * len(rows))}
    rows.append(total | {m: f"**{wrong}** / **{refused}**" for m, (wrong, refused) in sums.items()})
    table = markdown(rows)
    print(table)
    if args.docs:
        text = DOCS.read_text()
        before, rest = text.split(MARKS[0])
        DOCS.write_text(before + MARKS[0] + table + MARKS[1] + rest.split(MARKS[1])[1])


if __name__ == "__main__":
    main()
