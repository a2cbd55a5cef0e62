"""The house rules that a machine can check: rooms import those before them, no circles, a light core, public names."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import newton_plugin

ROOT = Path(__file__).parent.parent
CORE = ROOT / "src" / "newton_plugin"
OURS = {"newton_plugin", "newton_plugin_lightning", "newton_plugin_transformers"}
ROOMS = {"algorithms", "convex", "bilevel"}

# The rooms of each folder in their order. A room imports those in lines before its own; rooms of one line do not import
# one another.
ORDER: dict[str, list[tuple[str, ...]]] = {
    "newton_plugin": [
        ("_errors",),
        ("_runtime",),
        ("_linalg", "_boundary"),
        ("_derivatives",),
        ("_curvature",),
        ("_step",),
        ("_doors",),
        ("functional", "testing"),
    ],
    "newton_plugin.algorithms": [
        ("_log_domain",),
        ("_list_loss", "_black_box", "_shortest_paths"),
        ("_sorting_network",),
        ("_sorting",),
        ("_ranking",),
    ],
    "newton_plugin.convex": [
        ("_status",),
        ("_system",),
        ("_active_set", "_smooth", "_solution"),
        ("_compiled",),
        ("_solvers",),
        ("_sparse",),
        ("_qp",),
    ],
    "newton_plugin.bilevel": [
        ("_errors", "_parameters", "_tensors"),
        ("_hypergradient",),
        ("_methods",),
    ],
    "benchmarks.evidence": [
        ("data",),
        ("problems",),
        ("rules",),
        ("training",),
        ("bilevel_lists", "live"),
        ("tables",),
    ],
}
# What the rooms beside the core may use of its private modules; public names are free.
OF_THE_CORE = {"algorithms": {"_errors", "_runtime"}, "convex": {"_errors", "_runtime"}, "bilevel": {"_errors"}}


def folder(package: str) -> Path:
    """Where a package's files are."""
    return (ROOT if package.startswith("benchmarks") else ROOT / "src") / package.replace(".", "/")


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


def rooms_used(path: Path, package: str) -> set[str]:
    """The rooms of ``package`` that a file imports from."""
    below = [
        name.removeprefix(f"{package}.").split(".")[0] for name in imported(path) if name.startswith(f"{package}.")
    ]
    return set(below) & {room for line in ORDER[package] for room in line}


def module_name(path: Path) -> str:
    """``newton_plugin._step.rule`` for its file; a package for its ``__init__.py``."""
    root = next(root for root in (ROOT / "src", ROOT / "integrations", ROOT) if path.is_relative_to(root))
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("package", ORDER)
def test_every_room_has_its_place(package: str) -> None:
    found = {p.stem for p in folder(package).iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert found - {"__init__", "__main__"} - ROOMS == {room for line in ORDER[package] for room in line}


@pytest.mark.parametrize(("package", "room"), [(p, room) for p in ORDER for line in ORDER[p] for room in line])
def test_rooms_import_those_before_them(package: str, room: str) -> None:
    line = next(k for k, rooms in enumerate(ORDER[package]) if room in rooms)
    allowed = {before for rooms in ORDER[package][:line] for before in rooms} | {room}
    place = folder(package) / room
    for path in place.rglob("*.py") if place.is_dir() else [place.with_suffix(".py")]:
        assert rooms_used(path, package) <= allowed, f"{path} imports a later room"


def test_no_circle() -> None:
    roots = ("src", "integrations", "benchmarks", "examples")
    files = {module_name(path): path for root in roots for path in (ROOT / root).rglob("*.py")}
    uses = {name: {used for used in imported(path) if used in files and used != name} for name, path in files.items()}
    assert sum(map(len, uses.values())) > len(files), "the imports were found"
    try:
        list(TopologicalSorter(uses).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_rooms_beside_the_core_use_public_names_and_not_each_other(room: str) -> None:
    for path in (CORE / room).rglob("*.py"):
        for name in imported(path):
            top, _, rest = name.partition(".")
            assert top not in OURS - {"newton_plugin"}, f"{path} imports {name}"
            below = rest.split(".")[0]
            if top == "newton_plugin" and below != room:
                assert below not in ROOMS, f"{path} imports {name}"
                assert not below.startswith("_") or below in OF_THE_CORE[room], f"{path} imports {name}"


@pytest.mark.parametrize("outer", ["integrations", "examples", "benchmarks"])
def test_outer_rooms_use_public_names_only(outer: str) -> None:
    for path in (ROOT / outer).rglob("*.py"):
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
