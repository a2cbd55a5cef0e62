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
from typing import Any

import matplotlib.image
import pytest
from tests import browser
from tests.reader import ROOT

PARTS = ROOT / "docs" / "_parts"
ROOMS = ("algorithms", "convex", "bilevel", "functional", "testing")
PACKAGES = ["newton_plugin"] + [f"newton_plugin.{room}" for room in ROOMS]
PACKAGES += sorted(p.parent.name for p in (ROOT / "integrations").glob("*/__init__.py"))


def part(name: str) -> Any:
    """A module of docs/_parts."""
    spec = importlib.util.spec_from_file_location(name, PARTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["docstrings", "pages", "questions"])
def test_what_is_changed_on_the_way(name: str) -> None:
    module = part(name)
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


def test_a_page_of_the_reference_opens_with_what_is_called_first() -> None:
    for package, name in {
        "newton_plugin": "newton_loss",
        "newton_plugin_lightning": "NewtonLosses",
        "newton_plugin_transformers": "NewtonTrainerLoss",
        "newton_plugin.algorithms": "RankingLoss",
        "newton_plugin.convex": "solve_qp",
        "newton_plugin.bilevel": "MASOBA",
    }.items():
        text = (ROOT / "docs" / "api" / f"{package}.md").read_text()
        named = re.findall(rf"^\.\. auto(?:class|function|exception):: {package}\.(\w+)$", text, re.MULTILINE)
        assert named[0] == name


QUESTIONS = (ROOT / "docs" / "questions.md").read_text()
# What readers ask, and what they type: each has an answer, one click from the first page, with a way on in it.
ASKED = {
    "Does it help on my problem?": ("does it help", "my problem"),
    "How do I choose?": ("choose",),
    "What does it cost on my GPU?": ("cost", "GPU"),
    "What about DDP, FSDP?": ("DDP", "FSDP"),
    "Which learning rate do I take?": ("learning rate",),
    "How do I turn it off?": ("turn off", "disable"),
    "How do I compare fairly?": ("compare", "fair"),
    "How do I upgrade?": ("upgrade",),
    "How do I extend it?": ("extend",),
    "How do I cite it?": ("cite", "BibTeX"),
    "Where do I report a fault?": ("report", "security"),
}


def answer(question: str) -> str:
    return QUESTIONS.split(f"## {question}\n", 1)[1].split("\n## ", 1)[0]


@pytest.mark.parametrize("question", ASKED)
def test_every_question_has_an_answer_two_clicks_away(question: str) -> None:
    """docs/index.md links to the answer, the answer to pages that exist; it has the words that lead to it."""
    anchor = re.sub(r"[^\w ]", "", question).lower().replace(" ", "-")
    assert f"[{question}](questions.md#{anchor})" in (ROOT / "docs" / "index.md").read_text()
    text = answer(question)
    pages = re.findall(r"\]\(([\w./-]+\.md)[#)]", text)
    assert pages
    assert all((ROOT / "docs" / page).is_file() for page in pages)
    visible = re.sub(r"<!--.*?-->", "", f"{question} {text}").lower()
    searched = {name.lower() for names in part("questions").words(text).values() for name in names}
    for words in ASKED[question]:
        assert words.lower() in searched, f"docs/questions.md, {question}: no <!-- search {words} -->"
        assert all(word in visible for word in words.lower().split())


def test_words_that_lead_to_another_page_are_on_it() -> None:
    named = part("questions").words(QUESTIONS)
    for page in named.keys() - {"questions"}:
        text = (ROOT / "docs" / f"{page}.md").read_text()
        entries = part("questions").with_entries(f"docs/{page}", text, QUESTIONS)
        assert all(f"single: {word}\n" in entries for word in named[page])
        assert any(re.search(word, text, re.IGNORECASE) for word in named[page]), page


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
def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    """Formulas neither: they are MathML, and no TeX is left of them."""
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|iframe)[^>]* src="(https?:[^"]+)"', page.read_text())
        loaded += re.findall(r'<link[^>]* rel="stylesheet"[^>]* href="(https?:[^"]+)"', page.read_text())
        assert loaded == [], page.name
    reference = (site / "docs" / "api" / "newton_plugin.algorithms.html").read_text()
    assert reference.count('<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">') >= 10
    assert "\\frac" not in reference
    assert "mathjax" not in reference.lower()


@pytest.mark.slow
def test_the_sidebar_has_one_entry_for_all_tables(site: Path) -> None:
    index = (site / "docs" / "index.html").read_text()
    entries = re.findall(r'<li class="toctree-l1[^"]*"><a class="reference internal" href="([^"]+)"', index)
    assert "measured.html" in entries
    assert not [entry for entry in entries if "benchmarks/" in entry]
    assert index.count('href="../benchmarks/results/') >= 40  # below that entry


@pytest.mark.slow
def test_lists_in_docstrings_are_lists(site: Path) -> None:
    reference = letters_kept((site / "docs" / "api" / "newton_plugin.html").read_text())
    assert "newton_loss(loss_fn)</span></code>: wrap" in reference
    assert re.search(r"<li><p><code[^>]*><span[^>]*>newton_loss\(loss_fn\)", reference)


def letters_kept(page: str) -> str:
    """A page of HTML without the marks that Sphinx puts around every word of a literal."""
    return re.sub(r'</span> <span class="pre">', " ", page)


@pytest.fixture(scope="module")
def chromium() -> str:
    found = browser.find()
    if found is None:
        pytest.skip(f"NOT LOOKED AT: no browser ({', '.join(browser.NAMES)}) on this machine: apt-get install chromium")
    return found


WIDTHS = (1280, 390)  # a laptop, a telephone


@pytest.mark.slow
def test_no_element_is_wider_than_its_page(site: Path, chromium: str, tmp_path: Path) -> None:
    """In a real browser: what does not fit scrolls, and nothing is cut off."""
    pages = [p.relative_to(site).as_posix() for p in sorted(site.rglob("*.html"))]
    pages = [
        p
        for p in pages
        if p.startswith(("docs/", "benchmarks/")) or p in ("README.html", "CHANGELOG.html", "CONTRIBUTING.html")
    ]
    assert len(pages) > 60
    tasks = [{"page": f"/{page}", "width": width} for page in pages for width in WIDTHS]
    answers = browser.ask(chromium, site, tasks, seconds=400)
    assert len(answers) == len(tasks), answers
    found = {f"{task['page']} at {task['width']}": what for task, what in zip(tasks, answers, strict=True) if what}
    assert found == {}
    for width in WIDTHS:
        picture = tmp_path / f"{width}.png"
        browser.screenshot(chromium, site, "docs/index.html", (width, 900), picture)
        pixels = matplotlib.image.imread(picture)
        assert pixels.shape[:2] == (900, width)
        assert pixels.std() > 0.05  # something is drawn


@pytest.mark.slow
def test_an_element_that_is_too_wide_is_noticed(chromium: str, tmp_path: Path) -> None:
    """The test above can fail: what sticks out, what is cut off, and what may stay because it scrolls."""
    line = '<p style="width: 700px">wide</p>'
    for name, inside in {
        "out": line,
        "cut": f'<div style="overflow: hidden">{line}</div>',
        "scrolls": f'<div style="overflow-x: auto">{line}</div>',
    }.items():
        page = f'<!doctype html><body style="margin: 0"><div class="content"><article>{inside}</article></div>'
        (tmp_path / f"{name}.html").write_text(page)
    tasks = [{"page": f"/{name}.html", "width": width} for name in ("out", "cut", "scrolls") for width in WIDTHS]
    wide = [bool(what) for what in browser.ask(chromium, tmp_path, tasks, seconds=100)]
    assert wide == [False, True, False, True, False, False]


@pytest.mark.slow
def test_the_search_box_finds_the_answer_first(site: Path, chromium: str) -> None:
    named = part("questions").words(QUESTIONS)
    wanted = {word: page for page, words in named.items() for word in words}
    first = browser.ask(chromium, site, [{"search": word} for word in wanted], seconds=300)
    assert len(first) == len(wanted), first
    for (word, page), address in zip(wanted.items(), first, strict=True):
        assert address.startswith(f"/docs/{page}.html"), f"{word}: {address}"
