"""Differentiable QP layers side by side: time of forward + backward, with the error of the gradients beside it.

    python -m benchmarks.qp_layers [--quick] [--only random portfolio sparse] [--sizes 10 50] [--goals] [--docs]

``--only`` and ``--sizes`` time a part of the cases anew, ``--goals`` the methods of the table of goals, and keep what
the results file has of the others. ``--large`` is n = 1,000 in batches of 64, against QPLayer alone. ``--docs`` also
writes the table of docs/convex.md.

One process, one thread, float64, methods interleaved round by round; two problems alternate, so that nothing computed
for the last call serves the next. Timed is what a training step pays, from the six tensors to their six gradients:
conversion, factorisation and OSQP's setup included. Objects that a user builds once (a cvxpy problem, moreau's solver)
are built outside and listed as ``build_ms``. Times are CPU times of the process: other work on the machine is not in
them, though what it does to caches is. A ratio is the median over the rounds of peer / ours. Errors are relative,
against the solution by construction and the gradients of a dense KKT solve (``problems.py``).

``limit`` is one Cholesky factorisation of Q and one back-substitution: every program with constraints takes longer.
``active set known`` is what is left when an oracle names the active rows: one factorisation of the KKT matrix
(by its Schur complement), one solve forward, one backward, six gradients written.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path

import torch
from benchmarks.qp_layers import peers, sparse
from benchmarks.qp_layers.problems import Problem, portfolio, random_qp, relative_error
from benchmarks.tables import markdown
from torch import Tensor

RESULTS = Path(__file__).parents[1] / "results"
Leaves = dict[str, Tensor]
Run = Callable[[Leaves, Tensor, Problem], Tensor]
OURS = "ours (auto)"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
PEERS = ("qpth", "proxsuite", "cvxpylayers", "moreau", "osqp", "daqp", "numba")
KEY = ("case", "n", "batch", "active", "shared", "method")
DOCS = Path(__file__).parents[2] / "docs" / "convex.md"
MARKS = "<!-- table by python -m benchmarks.qp_layers -->\n\n", "\n\n<!-- end of the table -->"


def by_autograd(layer: peers.Layer) -> Run:
    def run(t: Leaves, g: Tensor, _: Problem) -> Tensor:
        x = layer(t)
        (x * g).sum().backward()
        return x

    return run


def limit(t: Leaves, g: Tensor, _: Problem) -> Tensor:
    with torch.no_grad():
        factor = torch.linalg.cholesky_ex(t["Q"])[0]
        return torch.cholesky_solve(-t["p"].unsqueeze(-1), factor).squeeze(-1)


@torch.no_grad()
def active_set_known(t: Leaves, g: Tensor, problem: Problem) -> Tensor:
    """Every element has as many active rows as the others, so they are gathered into one tensor."""
    Q, p, A, b, G, h = (t[k] for k in ("Q", "p", "A", "b", "G", "h"))
    rows = torch.from_numpy(problem.lam > 0).nonzero()[:, 1].view(len(p), -1)
    batch, e = torch.arange(len(p)).unsqueeze(-1), b.shape[-1]
    C = torch.cat([A.expand(len(p), *A.shape[-2:]), G[rows] if G.ndim == 2 else G[batch, rows]], -2)
    d = torch.cat([b, h.gather(-1, rows)], -1)
    factor = torch.linalg.cholesky_ex(Q)[0]
    V = torch.linalg.solve_triangular(factor, C.mT, upper=False)
    schur = torch.linalg.cholesky_ex(V.mT @ V)[0]

    def solve(r: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:  # Q x + C' w = r, C x = s
        u = torch.linalg.solve_triangular(factor, r.unsqueeze(-1), upper=False)
        w = torch.cholesky_solve(V.mT @ u - s.unsqueeze(-1), schur)
        return torch.linalg.solve_triangular(factor.mT, u - V @ w, upper=True).squeeze(-1), w.squeeze(-1)

    (x, dual), (z, w) = solve(-p, d), solve(-g, torch.zeros_like(d))
    lam, w_g = (torch.zeros_like(h).scatter(-1, rows, v[:, e:]) for v in (dual, w))
    nu, w_a = dual[:, :e], w[:, :e]

    def outer(a: Tensor, a_x: Tensor, c: Tensor, c_z: Tensor, like: Tensor) -> Tensor:
        left, right = torch.stack([a, c], -1), torch.stack([a_x, c_z], -1)
        if like.ndim == 2:
            return left.transpose(0, 1).flatten(1) @ right.transpose(0, 1).flatten(1).mT
        return left @ right.mT

    t["p"].grad, t["b"].grad, t["h"].grad = z, -w_a, -w_g
    t["Q"].grad = outer(z, x, x, z, Q) / 2
    t["A"].grad, t["G"].grad = outer(w_a, x, nu, z, A), outer(w_g, x, lam, z, G)
    return x


def dense_methods(problem: Problem, goals_only: bool = False) -> dict[str, Callable[[Problem], Run]]:
    """Name -> maker; a method is left out of the cases for which it would need minutes."""
    batch, n = problem.x.shape
    work = batch * n**3

    def auto(layer: Callable[..., peers.Layer], **options: object) -> Callable[[Problem], Run]:
        return lambda p: by_autograd(layer(p, **options))

    table = {OURS: auto(peers.ours), "proxsuite QPLayer": auto(peers.qplayer)}
    if n <= 500:
        table["moreau"] = auto(peers.moreau)
        table["qpth"] = auto(peers.qpth)
    if work <= 64 * 100**3 or batch == 1:
        table["ours (daqp)"] = auto(peers.ours, solver="daqp")
        table["ours (torch)"] = auto(peers.ours, solver="torch")
        table["OSQP recipe, 1e-5"] = auto(peers.recipe)
    if work <= 100**3:
        table["OSQP recipe, 1e-9 + polish"] = auto(peers.recipe, eps=1e-9)
        table["cvxpylayers (moreau)"] = auto(peers.cvxpylayers, solver="MOREAU")
        table["cvxpylayers (diffcp)"] = auto(peers.cvxpylayers)
    table["active set known"] = lambda _: active_set_known
    table["limit"] = lambda _: limit
    kept = {OURS, "active set known", "limit", *(goal[0] for goal in GOALS)} if goals_only else set(table)
    return {name: make for name, make in table.items() if name in kept}


def compare(
    case: dict, problems: list[Problem], methods: dict[str, Callable[[Problem], Run]], budget: float, error: Callable
) -> list[dict]:
    """Interleaved rounds; a method stops after ``budget`` seconds and four rounds, or four times ``budget``."""
    rows: dict[str, dict] = {}
    runs: dict[str, Run] = {}
    times: dict[str, list[float]] = {}
    last: dict[str, tuple] = {}
    for name, make in methods.items():
        row = {**case, "method": name}
        try:
            start = time.process_time()
            runs[name] = make(problems[0])
            row["build_ms"] = 1e3 * (time.process_time() - start)
            times[name] = []
            rows[name] = row
        except Exception as problem:  # a peer that cannot do this case is a finding
            rows[name] = {**row, "failed": f"{type(problem).__name__}: {problem}"[:200]}
    for k in range(200):
        current = problems[k % len(problems)]
        g = torch.tensor(current.seed_gradient)
        for name, run in list(runs.items()):
            spent = sum(times[name][1:])  # the first call also loads libraries
            if spent > budget and (len(times[name]) >= 4 or spent > 4 * budget):
                continue
            t = current.leaves()
            start = time.process_time()
            try:
                x = run(t, g, current)
            except Exception as problem:
                rows[name]["failed"] = f"{type(problem).__name__}: {problem}"[:200]
                del runs[name]
                continue
            times[name].append(time.process_time() - start)
            last[name] = (x, t, current)
        if all(sum(times[name][1:]) > budget for name in runs):
            break
    for name, row in rows.items():
        used = times.get(name, [])
        steady = used[1:] or used
        if not steady:
            continue
        row |= {"ms": 1e3 * statistics.median(steady), "rounds": len(steady)}
        ours = times[OURS][1:] or times[OURS]
        row["peer/ours"] = statistics.median(p / o for p, o in zip(steady, ours, strict=False))
        if name != "limit":
            row["x_error"], row["gradient_error"] = error(*last[name])
    return list(rows.values())


def dense_cases(quick: bool, large: bool) -> list[tuple[dict, Callable[[int], Problem]]]:
    sizes = [(10, 1), (10, 64)] if quick else [(n, k) for n in (10, 50, 100, 500) for k in (1, 64)] + [(1000, 1)]
    sizes = [(1000, 64)] if large else sizes
    cases = []
    for n, batch in sizes:
        for active in (0.05, 0.4) if n * batch < 500 * 64 else (0.4,):
            for shared in (False, True) if batch > 1 and n <= 100 else (False,):
                case = {"case": "random", "n": n, "batch": batch, "active": active, "shared": shared}
                cases.append((case, partial(_random, n, batch, active, shared)))
    for n in () if large else (20,) if quick else (50, 500):
        for batch in (1, 64):
            case = {"case": "portfolio", "n": n, "batch": batch, "active": 0.3, "shared": True}
            cases.append((case, partial(_portfolio, n, batch)))
    return cases


def _random(n: int, batch: int, active: float, shared: bool, seed: int) -> Problem:
    return random_qp(n, batch, active, shared=shared, seed=seed)


def _portfolio(n: int, batch: int, seed: int) -> Problem:
    return portfolio(n, batch, seed=seed)


# (peer, case, n, batch, shared, goal): total time of the peer / total time of ours.
GOALS = [
    ("proxsuite QPLayer", 100, 1, False, 1.7),
    ("proxsuite QPLayer", 500, 1, False, 2.5),
    ("proxsuite QPLayer", 10, 64, False, 5.0),
    ("proxsuite QPLayer", 50, 64, False, 4.0),
    ("proxsuite QPLayer", 100, 64, False, 2.5),
    *[("proxsuite QPLayer", n, 64, True, 6.0) for n in (10, 50, 100)],
    *[("moreau", n, 64, False, 2.0) for n in (10, 50, 100, 500)],
    *[("qpth", n, 64, False, 8.0) for n in (10, 50, 100)],
    ("OSQP recipe, 1e-5", 100, 1, False, 8.0),
    *[("OSQP recipe, 1e-5", n, 64, False, 15.0) for n in (10, 50, 100)],
]


def goals(rows: list[dict]) -> list[dict]:
    """One row for each goal: reached only if it is so with few and with many active rows."""
    table = []
    for peer, n, batch, shared, goal in GOALS:
        key = {"case": "random", "n": n, "batch": batch, "shared": shared, "method": peer}
        found = {r["active"]: r.get("peer/ours") for r in rows if all(r.get(k) == v for k, v in key.items())}
        values = [v for v in found.values() if v is not None]
        if values:
            row = {"against": peer, "n": n, "batch": batch, "shared": shared, "goal": goal}
            row |= {f"measured, {100 * a:.0f} % active": v for a, v in sorted(found.items())}
            table.append({**row, "reached": "yes" if min(values) >= goal else "no"})
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.qp_layers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes only, some seconds")
    parser.add_argument("--only", nargs="+", choices=("random", "portfolio", "sparse"), help="these cases only")
    parser.add_argument("--sizes", nargs="+", type=int, help="these numbers of variables only")
    parser.add_argument("--goals", action="store_true", help="the methods of the table of goals only")
    parser.add_argument("--large", action="store_true", help="n = 1,000 in a batch of 64 (8 GB of memory)")
    parser.add_argument("--docs", action="store_true", help="write the table of docs/convex.md")
    parser.add_argument("--budget", type=float, default=0.5, help="seconds for each method and case")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if any(os.environ.get(k) != "1" for k in THREADS):  # read by the libraries when they are loaded
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.qp_layers", *sys.argv[1:]], _one_thread())
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # QPLayer writes its gradients in the default dtype
    warnings.filterwarnings("ignore", module=r"(moreau|cvxpy|qpth|proxsuite|diffcp).*")
    path = options.out / "qp_layers.json"
    kept = json.loads(path.read_text())["rows"] if path.exists() and not options.quick else []
    wanted = ("random",) if options.large else options.only or ("random", "portfolio", "sparse")
    budget = 0.2 if options.quick else options.budget
    rows: list[dict] = []

    def selected(case: dict) -> bool:
        return case["case"] in wanted and (not options.sizes or case["n"] in options.sizes)

    for case, make in dense_cases(options.quick, options.large):
        if selected(case):
            problems = [make(seed) for seed in ((0,) if case["n"] * case["batch"] > 500 * 64 else (0, 1))]
            methods = dense_methods(problems[0], options.goals)
            rows += compare(case, problems, methods, budget, partial(_dense_error, cache(Problem.gradients)))
            print(markdown([r for r in rows if case.items() <= r.items()]), flush=True)
    if "sparse" in wanted:
        for case, problems, methods in sparse.cases(options.quick):
            if selected(case):
                rows += compare(case, problems, methods, budget, sparse.error)
                print(markdown([r for r in rows if case.items() <= r.items()]), flush=True)
    new = {tuple(r.get(k) for k in KEY) for r in rows}
    rows += [r for r in kept if tuple(r.get(k) for k in KEY) not in new]
    order = {"random": 0, "portfolio": 1, "sparse": 2}
    rows.sort(key=lambda r: (order[r["case"]], r["n"], r["batch"], r["active"], r["shared"]))
    write(options.out, rows)
    if options.docs:
        before, rest = DOCS.read_text().split(MARKS[0])
        DOCS.write_text(before + MARKS[0] + summary(rows) + MARKS[1] + rest.split(MARKS[1])[1])


def _dense_error(true: Callable, x: Tensor, t: Leaves, problem: Problem) -> tuple[float, float]:
    return relative_error(x, t, problem, true(problem))


def summary(rows: list[dict]) -> str:
    """One line for each case: the time of ours, and of the others in units of it; the largest errors below."""
    shown = {"proxsuite QPLayer": "QPLayer", "OSQP recipe, 1e-5": "OSQP recipe"}
    shown = {name: shown.get(name, name) for name in (*dict.fromkeys(goal[0] for goal in GOALS), "active set known")}
    cases: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        cases.setdefault(tuple(row[k] for k in KEY[:-1]), {})[row["method"]] = row
    table = []
    for (case, n, batch, active, shared), methods in cases.items():
        ours = methods[OURS]
        line = {"problem": case, "n": n, "batch": batch, "active": f"{100 * active:.0f} %"}
        line |= {"shared": "yes" if shared and case != "sparse" else "", "ours, ms": f"{ours['ms']:.3g}"}
        for name, head in shown.items():
            ratio = methods.get(name, {}).get("peer/ours")
            line[head] = "" if ratio is None else f"{ratio:.2g}"
        table.append(line)
    errors = []
    for name in dict.fromkeys(r["method"] for r in rows):
        # For a shared matrix qpth returns the mean of the batch's gradients and not their sum.
        own = [
            r for r in rows if r["method"] == name and r["case"] == "random" and not (name == "qpth" and r["shared"])
        ]
        worst = [max((r[k] for r in own if k in r), default=None) for k in ("x_error", "gradient_error")]
        if None not in worst and name != "active set known":
            errors.append({"largest relative error": name, "x": f"{worst[0]:.0e}", "gradients": f"{worst[1]:.0e}"})
    return "\n\n".join((markdown(table), markdown(errors), sparse.accuracy_table(rows)))


def compile_seconds() -> list[float]:
    """CPU seconds to import the compiled code: with an empty cache, and from the cache."""
    code = "import time, torch, numba, newton_plugin.convex as c; t = time.process_time(); import {}; print({})"
    code = code.format("newton_plugin.convex._compiled.qp", "time.process_time() - t")
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
        command = [sys.executable, "-c", code]
        return [float(subprocess.check_output(command, env=environment)) for _ in range(2)]


def _one_thread() -> dict[str, str]:
    return {**os.environ, **dict.fromkeys(THREADS, "1")}


def write(out: Path, rows: list[dict]) -> None:
    machine = {"torch": torch.__version__, "threads": 1, "cpu": platform.processor() or platform.machine()}
    machine |= {name: version(name) for name in PEERS}
    first, later = compile_seconds()
    machine |= {"compiling, s": f"{first:.1f} (the first time; {later:.2f} from the cache)"}
    reached = goals(rows)
    out.mkdir(parents=True, exist_ok=True)
    (out / "qp_layers.json").write_text(
        json.dumps({"machine": machine, "goals": reached, "rows": rows}, indent=1) + "\n"
    )
    versions = ", ".join(f"{k} {v}" for k, v in machine.items())
    parts = [f"{versions}. Made by `python -m benchmarks.qp_layers`."]
    parts += ["## Goals\n", markdown(reached)] if reached else []
    parts += ["## Summary\n", "Peers: their time / ours.", summary(rows), "## Everything\n", markdown(rows)]
    (out / "qp_layers.md").write_text("\n\n".join(parts) + "\n")
    print(markdown(reached))


if __name__ == "__main__":
    main()
