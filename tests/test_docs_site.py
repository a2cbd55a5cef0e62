"""The site is built without a warning, from the repository as it is, and has in it what it should have."""

from __future__ import annotations

import doctest
import html
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.reader import ROOT

PARTS = ROOT / "docs" / "_parts"
ROOMS = ("algorithms", "convex", "bilevel", "functional", "testing")
PACKAGES = ["newton_plugin"] + [f"newton_plugin.{room}" for room in ROOMS]
PACKAGES += sorted(p.parent.name for p in (ROOT / "integrations").glob("*/__init__.py"))


@pytest.mark.parametrize("name", ["docstrings", "pages"])
def test_what_is_changed_on_the_way(name: str) -> None:
    spec = importlib.util.spec_from_file_location(name, PARTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    failed, attempted = doctest.testmod(module)
    assert attempted > 0
    assert failed == 0
    if name == "pages":
        mark = "<!-- results that this page does not name -->"
        text = module.with_unnamed("docs/measured", f"[a](../benchmarks/results/ranks.md)\n{mark}", ROOT)
        assert "(../benchmarks/results/smoothing.md)" in text
        assert text.count("ranks.md") == 1


def test_every_package_has_a_page() -> None:
    assert {page.stem for page in (ROOT / "docs" / "api").glob("*.md")} == set(PACKAGES)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sphinx", reason='the site needs pip install -e ".[docs]"')
    out = tmp_path_factory.mktemp("site")
    options = ["--fail-on-warning", "--keep-going", "--fresh-env", "-q", "-b", "html", "-c", "docs"]
    command = [sys.executable, "-m", "sphinx", *options, ".", str(out)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stderr
    return out


@pytest.mark.slow
def test_every_public_name_is_in_the_reference(site: Path) -> None:
    from sphinx.util.inventory import InventoryFile

    with open(site / "objects.inv", "rb") as file:
        inventory = InventoryFile.load(file, "", lambda base, path: path)
    if not isinstance(inventory, dict):  # Sphinx 8.2 and later
        inventory = inventory.data
    known = {name for kind, names in inventory.items() if kind.startswith("py:") for name in names}
    for package in PACKAGES:
        module = importlib.import_module(package)
        names = {f"{package}.{name}" for name in module.__all__ if not hasattr(getattr(module, name), "__path__")}
        assert names <= known, f"not in docs/api/{package}.md: {sorted(names - known)}"


def letters(page: str) -> str:
    """Letters and digits of what a reader sees of a page of HTML."""
    return re.sub(r"\W", "", html.unescape(re.sub(r"<[^>]+>", "", page)))


@pytest.mark.slow
def test_tables_and_pictures_are_in_it(site: Path) -> None:
    for results in (ROOT / "benchmarks" / "results").glob("*.md"):
        page = letters((site / "benchmarks" / "results" / f"{results.stem}.html").read_text())
        first = next(line for line in results.read_text().splitlines() if line.startswith("| "))
        for cell in first.strip("| ").split(" | "):
            assert letters(html.escape(cell)) in page, f"{results.name}: {cell}"
    tour = (site / "docs" / "tour.html").read_text()
    assert len(re.findall(r'<img [^>]*src="../_images/\w+\.png"', tour)) == 5
    assert 'url=docs/index.html"' in (site / "index.html").read_text()


@pytest.mark.slow
def test_pages_load_nothing_from_elsewhere_but_mathematics(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|iframe)[^>]* src="(https?:[^"]+)"', page.read_text())
        loaded += re.findall(r'<link[^>]* rel="stylesheet"[^>]* href="(https?:[^"]+)"', page.read_text())
        assert all("mathjax" in address for address in loaded), f"{page.name}: {loaded}"
