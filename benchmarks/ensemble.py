"""Networks trained together by ``vmap`` beside a loop over them, plain and with Newton Losses.

    python -m benchmarks.ensemble                       # everything; the compiler takes most of the time
    python -m benchmarks.ensemble --members 8 --rounds 10 --no-compile --out /tmp/try
    python -m benchmarks.ensemble --table               # no measuring: Markdown from the rows that there are

A step is forward, gradient and SGD of all networks, each with a batch of its own. Ways to take it:

* vmap: ``vmap(grad(loss, has_aux=True))`` over stacked parameters and states, ``npl.functional.newton_loss``
* compiled: the same function, ``torch.compile(fullgraph=True)`` with inductor
* functional: ``grad(functional_call)`` of one network after the other
* LossHook: ``hook(loss).backward()`` of one network after the other

All ways and rules take turns in each round, in one process, one thread and float64; times are CPU times, ratios are
medians over rounds. "apart" is how far the parameters of all ways are apart after five steps, relative to the largest.
Results: benchmarks/results/ensemble.json and ensemble.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from benchmarks.tables import markdown
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

import newton_plugin as npl
from newton_plugin.algorithms import RankingLoss

RESULTS = Path(__file__).parent / "results"
RULES: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "default": {},
    "norm": {"curvature": "norm"},
    "hessian": {"curvature": "hessian", "damping": 0.1},
}
RATE, WARM_UP, STEPS_COMPARED = 0.1, 3, 5
Parameters = dict[str, Tensor]
Step = Callable[[], None]


class Task(NamedTuple):
    """A network, its loss, and the shapes of one network's batch.

    Attributes:
        make: the network.
        loss: of outputs and targets.
        batch: inputs and targets of so many networks.
        compiled: numbers of networks for which the step is compiled.
    """

    make: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    batch: Callable[[int], tuple[Tensor, Tensor]]
    compiled: tuple[int, ...]


def mlp(outputs: int, *more: nn.Module) -> nn.Module:
    """64-64-32-outputs."""
    layers = (nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, outputs))
    return nn.Sequential(*layers, *more)


TASKS = {
    "cross-entropy, N = 32, m = 10": Task(
        lambda: mlp(10), F.cross_entropy, lambda k: (torch.rand(k, 32, 64), torch.randint(10, (k, 32))), (1, 8, 32)
    ),
    "NeuralSort, N = 32, n = m = 10": Task(
        lambda: mlp(1, nn.Flatten(-2)),
        RankingLoss("neural_sort", temperature=0.1),
        lambda k: (torch.rand(k, 32, 10, 64), torch.rand(k, 32, 10).argsort(-1)),
        (8,),
    ),
}


class Ways:
    """The same training of the same networks, in each of the ways."""

    def __init__(self, task: Task, options: dict[str, Any] | None, members: int) -> None:
        torch.manual_seed(0)
        self.options, self.loss_fn = options, task.loss
        self.models = [task.make().double() for _ in range(members)]
        inputs, self.targets = task.batch(members)
        self.inputs = inputs.double()
        self.form = task.make().to("meta")
        self.newton = npl.functional.newton_loss(task.loss, **(options or {}))
        self.found: dict[str, Callable[[], Parameters]] = {}  # the parameters of each way, stacked

    def stacked(self) -> Parameters:
        return {name: p.detach().clone() for name, p in stack_module_state(self.models)[0].items()}

    def loss(self, parameters: Parameters, state: Any, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Any]:
        outputs = functional_call(self.form, parameters, (inputs,))
        if self.options is None:
            return self.loss_fn(outputs, targets), state
        return self.newton.apply(state, outputs, targets)

    def states(self) -> Any:
        with torch.no_grad():
            outputs = torch.stack([model(x) for model, x in zip(self.models, self.inputs, strict=True)])
        # Copies: what all networks share is one number in memory, a form for which the compiler would compile anew.
        return torch.utils._pytree.tree_map(torch.clone, vmap(self.newton.init)(outputs, self.targets))

    def vmap(self, compiled: bool = False) -> Step:
        gradients_of: Any = vmap(grad(self.loss, has_aux=True))
        if compiled:
            gradients_of = torch.compile(gradients_of, fullgraph=True, dynamic=False)
        parameters, states = self.stacked(), self.states()
        self.found["compiled" if compiled else "vmap"] = lambda: parameters

        def step() -> None:
            nonlocal states
            gradients, states = gradients_of(parameters, states, self.inputs, self.targets)
            descend(parameters, gradients)

        return step

    def functional(self) -> Step:
        of_all, all_states = self.stacked(), self.states()
        count = range(len(self.models))
        parameters = [{name: p[k].clone() for name, p in of_all.items()} for k in count]
        states = [torch.utils._pytree.tree_map(lambda leaf, k=k: leaf[k], all_states) for k in count]
        self.found["functional"] = lambda: {name: torch.stack([p[name] for p in parameters]) for name in of_all}
        gradient_of = grad(self.loss, has_aux=True)

        def step() -> None:
            for k in count:
                gradients, states[k] = gradient_of(parameters[k], states[k], self.inputs[k], self.targets[k])
                descend(parameters[k], gradients)

        return step

    def hook(self) -> Step:
        hooks = [None if self.options is None else npl.LossHook(**self.options) for _ in self.models]
        self.found["LossHook"] = self.stacked

        def step() -> None:
            for model, hook, x, t in zip(self.models, hooks, self.inputs, self.targets, strict=True):
                loss = self.loss_fn(model(x), t)
                (loss if hook is None else hook(loss)).backward()
                named = dict(model.named_parameters())
                descend(named, {name: p.grad for name, p in named.items()})
                model.zero_grad()

        return step

    def steps(self, compiled: bool) -> dict[str, Step]:
        """A step of each way. The last one changes ``models``, from which the others were copied."""
        found = {"vmap": self.vmap()} | ({"compiled": self.vmap(compiled=True)} if compiled else {})
        return {**found, "functional": self.functional(), "LossHook": self.hook()}


@torch.no_grad()
def descend(parameters: Parameters, gradients: Any) -> None:
    """One step of SGD, in place."""
    for name, parameter in parameters.items():
        parameter.sub_(gradients[name], alpha=RATE)


def apart(ways: Ways, steps: dict[str, Step]) -> float:
    """Largest difference of parameters after some steps, relative to the largest of the parameters."""
    for step in steps.values():
        for _ in range(STEPS_COMPARED):
            step()
    reference = ways.found["LossHook"]()
    scale = max(float(p.abs().max()) for p in reference.values())
    others = [found() for name, found in ways.found.items() if name != "LossHook"]
    return max(float((o[name] - p).abs().max()) for o in others for name, p in reference.items()) / scale


def measure(title: str, task: Task, members: int, rounds: int, compile: bool) -> list[dict[str, Any]]:
    """A row for each rule."""
    compiled = compile and members in task.compiled
    steps, differences = {}, {}
    torch._dynamo.reset()  # the compiler looks through all that it has made of one function
    for rule, options in RULES.items():
        ways = Ways(task, options, members)
        own = ways.steps(compiled)
        differences[rule] = apart(ways, own)
        steps |= {(rule, way): step for way, step in own.items()}
    milliseconds: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for _ in range(WARM_UP + rounds):
        for key, step in steps.items():
            start = time.process_time()
            step()
            milliseconds[key].append(1e3 * (time.process_time() - start))

    def ratio(over: tuple[str, str], under: tuple[str, str]) -> float | str:
        if over not in steps:
            return ""
        pairs = zip(milliseconds[over][WARM_UP:], milliseconds[under][WARM_UP:], strict=True)
        return round(statistics.median(a / b for a, b in pairs), 3)

    rows = []
    for rule in RULES:
        row: dict[str, Any] = {"task": title, "networks": members, "rule": rule}
        for way in ("vmap", "compiled", "functional", "LossHook"):
            values = milliseconds.get((rule, way))
            row[f"{way}, ms"] = "" if values is None else round(statistics.median(values[WARM_UP:]), 2)
        row["LossHook / vmap"] = ratio((rule, "LossHook"), (rule, "vmap"))
        row["functional / LossHook"] = ratio((rule, "functional"), (rule, "LossHook"))
        for way in ("vmap", "compiled", "LossHook"):
            row[f"rule / plain, {way}"] = "" if rule == "plain" else ratio((rule, way), ("plain", way))
        row["apart"] = f"{differences[rule]:.0e}"
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    path = given.out / "ensemble.json"
    if not given.table:
        torch.set_num_threads(1)
        report: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version(), "rows": []}
        report["rounds"] = given.rounds
        given.out.mkdir(parents=True, exist_ok=True)
        for title, task in TASKS.items():
            for members in given.members:
                rows = measure(title, task, members, given.rounds, not given.no_compile)
                print(markdown(rows), flush=True)
                report["rows"] += rows
                report["load"] = max(report.get("load", 0.0), os.getloadavg()[0])
                path.write_text(json.dumps(report, indent=1) + "\n")
    report = json.loads(path.read_text())
    made = (
        f"torch {report['torch']}, Python {report['python']}, CPU, one thread, float64, CPU time, "
        f"{report['rounds']} rounds; two cores, load up to {report['load']:.1f} by other work."
    )
    path.with_suffix(".md").write_text(f"{markdown(report['rows'])}\n\n{made}\n")


if __name__ == "__main__":
    main()
