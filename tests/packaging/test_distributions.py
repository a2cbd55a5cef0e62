"""The wheel and the sdist that a release would upload: contents, metadata, and an environment with only the wheel."""

from __future__ import annotations

import email.message
import email.parser
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

import newton_plugin

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PACKAGES = {"newton_plugin", "newton_plugin_lightning", "newton_plugin_transformers"}
PROJECT = (ROOT / "pyproject.toml").read_text()


def run(*command: Any, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**os.environ, **environment}, text=True, capture_output=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def sdist(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist."""
    (path,) = dist.glob("*.tar.gz")
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(path) as archive:
        archive.extractall(
            folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {})
        )  # Python < 3.11.4 has none
    (unpacked,) = folder.iterdir()
    return unpacked


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return email.parser.Parser().parsestr(archive.read(name).decode())


def sources() -> set[str]:
    """Every file of the packages, by its path in a wheel."""
    found = set()
    for parent in (ROOT / "src", ROOT / "integrations"):
        for path in parent.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                found.add(path.relative_to(parent).as_posix())
    return found


def test_the_wheel_is_the_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
    assert names == sources()
    assert {n.split("/")[0] for n in names} == PACKAGES
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert wheel.name.endswith("-py3-none-any.whl")
    assert wheel.stat().st_size < 1_000_000


def test_the_sdist_has_what_the_tests_need(sdist: Path) -> None:
    names = ["README.md", "CHANGELOG.md", "LICENSE", "Makefile", "constraints.txt", "CITATION.cff", "pyproject.toml"]
    assert [name for name in names if not (sdist / name).is_file()] == []
    for folder in ("src", "integrations", "tests", "examples", "benchmarks", "docs"):
        inside = {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob("*.py") if "__pycache__" not in p.parts}
        packed = {p.relative_to(sdist).as_posix() for p in (sdist / folder).rglob("*.py")}
        assert packed == inside
    assert not list(sdist.rglob("__pycache__"))


def test_metadata(metadata: email.message.Message) -> None:
    assert metadata["Name"] == "newton-plugin"
    assert metadata["Version"] == newton_plugin.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    required = [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
    assert required == ["torch>=2.6"]
    extras = set(metadata.get_all("Provides-Extra", []))
    assert {"lightning", "transformers", "algorithms", "convex", "examples", "docs", "test", "dev", "all"} == extras
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    assert metadata.get_payload() == (ROOT / "README.md").read_text()


def test_the_version_is_written_down_once() -> None:
    assert 'dynamic = ["version"]' in PROJECT
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == newton_plugin.__version__
    assert f'license = "{citation["license"]}"' in PROJECT
    assert f"version = {{{newton_plugin.__version__}}}" in (ROOT / "docs" / "questions.md").read_text()
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## {newton_plugin.__version__}" in changelog


PYTHONS = ("3.10", "3.11", "3.12", "3.13")


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-oldest.txt"])
@pytest.mark.parametrize("python", PYTHONS)
def test_each_python_has_one_version_of_every_pinned_package(file: str, python: str) -> None:
    pins = [Requirement(line) for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
    chosen = [pin.name.lower() for pin in pins if pin.marker is None or pin.marker.evaluate({"python_version": python})]
    assert sorted(chosen) == sorted({pin.name.lower() for pin in pins})


def test_the_classifier_is_the_python_that_ci_runs(metadata: email.message.Message) -> None:
    named = {c.rpartition(" ")[2] for c in metadata.get_all("Classifier", []) if ":: Python :: 3." in c}
    assert named == {"3.11"}  # the python3 of CI's machine; .ci/run names no other
    assert not any(version in (ROOT / ".ci" / "run").read_text() for version in set(PYTHONS) - named)
    assert f"supported=({' '.join(PYTHONS)})" in (ROOT / ".ci" / "pythons").read_text()


def test_the_dry_run_of_a_release_stops_where_numbers_differ(tmp_path: Path) -> None:
    """Its first step, on a copy whose CITATION.cff is of another version; the rest is made of other targets."""
    for name in (".ci/release-dry-run", "CITATION.cff", "CHANGELOG.md", "src/newton_plugin/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    citation = tmp_path / "CITATION.cff"
    citation.write_text(citation.read_text().replace(newton_plugin.__version__, "99.0"))
    done = subprocess.run([tmp_path / ".ci" / "release-dry-run"], text=True, capture_output=True, timeout=60)
    assert done.returncode == 1
    assert "CITATION.cff names another version" in done.stderr


def test_twine_check(dist: Path) -> None:
    done = run(sys.executable, "-m", "twine", "check", "--strict", *sorted(dist.iterdir()), NO_COLOR="1")
    assert done.stdout.count("PASSED") == 2


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment into which pip has put the wheel; other packages are those of this one."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    (site,) = folder.glob("lib/python*/site-packages")
    # A path alone: the .pth files over there, and with them the editable installation of this checkout, do not act.
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_the_installed_wheel_trains(bare: Path) -> None:
    done = run(bare, "-I", HERE / "installed.py", "lightning", "transformers", cwd=bare.parent)
    assert "fine: lightning, transformers" in done.stdout


def test_a_users_type_checker_sees_the_annotations(bare: Path) -> None:
    """py.typed: exactly the lines that say so are wrong."""
    lines = (HERE / "users_file.py").read_text().splitlines()
    (bare.parent / "users_file.py").write_text("\n".join(lines))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", str(bare), "users_file.py"]
    done = subprocess.run(command, cwd=bare.parent, text=True, capture_output=True, timeout=600)
    found = json.loads(done.stdout)["generalDiagnostics"]
    wrong = {d["range"]["start"]["line"] for d in found if d["severity"] == "error"}
    assert wrong == {k for k, line in enumerate(lines) if "# wrong" in line}, done.stdout


@pytest.mark.slow
def test_the_sdist_runs_its_own_tests(sdist: Path) -> None:
    paths = os.pathsep.join([str(sdist / "src"), str(sdist / "integrations")])
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    collected = run(*command, "--collect-only", cwd=sdist, PYTHONPATH=paths)
    assert "error" not in collected.stdout.splitlines()[-1]
    run(*command, "tests/identities/test_identities.py", "tests/test_architecture.py", cwd=sdist, PYTHONPATH=paths)
