"""The house rules that a machine can check: imports point one way, the core is light, the names are the names."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import newton_plugin

ROOT = Path(__file__).parent.parent
CORE = ROOT / "src" / "newton_plugin"
LIGHTNING = ROOT / "integrations" / "newton_plugin_lightning"

# Each module may import those before it, never one after it.
ORDER = [
    "_errors",
    "_eager",
    "_fabric",
    "_rows",
    "_ranks",
    "_sample_hessians",
    "_memory",
    "_capture",
    "_running",
    "_solve",
    "_parts",
    "_damping",
    "_krylov",
    "_forms",
    "_sketch",
    "_low_rank",
    "_kept",
    "_curvature",
    "_fisher",
    "_independence",
    "_hessian_sums",
    "_hessian_samples",
    "_hessian",
    "_rule",
    "_diagnostics",
    "_graph",
    "_closed_form",
    "_surrogate",
    "_derivatives",
    "_live",
    "_newton",
    "_loss",
    "_boundary",
    "_graph_cut",
    "_recorded",
    "_hook",
]
OURS = {"newton_plugin", "newton_plugin_lightning", "newton_plugin_transformers"}
ROOMS = {"algorithms", "convex", "bilevel"}


def imported(path: Path) -> set[str]:
    """Modules that a file imports, by their full names."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by full name"
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own(names: set[str]) -> set[str]:
    return {n.split(".")[1] for n in names if n.startswith("newton_plugin.")}


def test_every_core_module_has_its_place() -> None:
    files = {p.stem for p in CORE.glob("*.py")} - {"__init__", "testing"}
    assert files == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_core_imports_point_one_way(name: str) -> None:
    allowed = set(ORDER[: ORDER.index(name)])
    modules = {n for n in own(imported(CORE / f"{name}.py")) if n in ORDER or n in ROOMS}
    assert modules <= allowed


@pytest.mark.parametrize("room", sorted(p.name for p in CORE.iterdir() if p.name in ROOMS))
def test_rooms_use_the_core_and_not_each_other(room: str) -> None:
    for path in (CORE / room).rglob("*.py"):
        for name in imported(path):
            assert not any(name.startswith(f"newton_plugin.{other}") for other in ROOMS - {room}), path
            assert not name.startswith("newton_plugin_lightning"), path


@pytest.mark.parametrize("folder", ["integrations", "examples", "benchmarks"])
def test_outer_rooms_use_public_names_only(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        for name in imported(path):
            parts = name.split(".")
            if parts[0] in OURS and parts[0] not in path.parts:
                assert not any(p.startswith("_") for p in parts[1:]), f"{path} imports {name}"


def test_core_imports_torch_alone() -> None:
    standard = set(sys.stdlib_module_names)
    for path in CORE.rglob("*.py"):
        outside = {n.split(".")[0] for n in imported(path)} - standard - {"torch", "newton_plugin"}
        if path.relative_to(CORE).parts[0] in ROOMS:  # where importing is lazy: see test_importing_is_light
            outside -= {"numpy", "scipy", "numba", "daqp", "clarabel", "osqp", "piqp", "qdldl"}
        assert not outside, f"{path} imports {outside}"


def test_importing_is_light() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import newton_plugin, newton_plugin.algorithms, "
        "newton_plugin.convex, newton_plugin.bilevel; "
        "heavy = {'pytorch_lightning', 'lightning', 'scipy', 'matplotlib', 'torchmetrics', 'sklearn', 'pandas', "
        "'numba', 'daqp', 'transformers', 'accelerate'}; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before}; print(sorted(new & heavy), "
        "'torch._dynamo' in set(sys.modules) - before)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[] False"


def test_public_names() -> None:
    assert newton_plugin.__all__ == sorted(newton_plugin.__all__)
    for name in newton_plugin.__all__:
        value = getattr(newton_plugin, name)
        assert value.__doc__, f"{name} has no docstring"
    promised = {"newton_loss", "NewtonLoss", "LossHook", "newton_step", "NewtonStep", "quadratic_surrogate"}
    promised |= {"Curvature", "Hessian", "EmpiricalFisher", "SoftNormalization", "Damping", "Tikhonov", "AutoDamping"}
    assert promised <= set(newton_plugin.__all__)
    errors = [getattr(newton_plugin, n) for n in newton_plugin.__all__ if n.endswith("Error")]
    for error in errors:
        assert error.__module__ == "newton_plugin", "tracebacks show the name that can be imported"
        assert issubclass(error, newton_plugin.NewtonPluginError)
        assert error is newton_plugin.NewtonPluginError or issubclass(error, (ValueError, TypeError, RuntimeError))


def test_no_room_for_leftovers() -> None:
    assert not [p for p in ROOT.rglob("utils.py") if not any(part.startswith(".venv") for part in p.parts)]


def test_examples_are_short() -> None:
    for path in (ROOT / "examples").rglob("*.py"):
        lines = len(path.read_text().splitlines())
        assert lines < 100, f"{path} has {lines} lines"
