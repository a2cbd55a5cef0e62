"""The documents are true: their code runs as written, their commands exist, their links lead somewhere.

The convention, for everybody who writes a page of docs/: every ```python block is run, all blocks of a page one after
the other with the names of ``tests/reader.py``. What is not to be run is no Python: ```text (what is printed),
```console and ```bash (commands, whose modules must exist), ```yaml (which must parse).
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
from pathlib import Path

import pytest
import yaml
from tests.reader import PAGES, ROOT, masked, parts, surroundings

MORE = (
    *sorted((ROOT / "docs" / "api").glob("*.md")),
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "benchmarks").rglob("*.md")),
)
WARNS = {"convex.md": "uses the empirical Fisher"}  # pages whose code warns, as they say
LANGUAGES = {"python", "text", "console", "bash", "yaml", "{eval-rst}", "{toctree}"}


def by_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [p for p in PAGES[1:] if parts(p)], ids=by_name)  # the README has its own test
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every error is told with the line of the page where it happened."""
    monkeypatch.chdir(tmp_path)
    names = surroundings()
    warns = pytest.warns(match=WARNS[page.name]) if page.name in WARNS else contextlib.nullcontext()
    with warns:
        for line, code, printed in parts(page):
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile("\n" * (line - 1) + code, str(page), "exec", dont_inherit=True), names)
            if printed is not None and out.getvalue():
                assert masked(out.getvalue()) == masked(printed), f"{page.name}, line {line}"


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_every_block_says_what_it_is(page: Path) -> None:
    fences = re.findall(r"^```(.*)$", page.read_text(), re.MULTILINE)
    opening, closing = fences[::2], fences[1::2]
    assert not any(closing), f"{page.name}: a block is not closed"
    assert set(opening) <= LANGUAGES, f"{page.name}: {set(opening) - LANGUAGES}"


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_nothing_is_left_to_be_filled_in(page: Path) -> None:
    assert not re.findall(r"^[A-Z_]{4,}$|\bTODO\b|\bFIXME\b|\bTBD\b", page.read_text(), re.MULTILINE), page.name


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_commands_and_settings_exist(page: Path) -> None:
    text = page.read_text()
    for block in re.findall(r"^```yaml\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        assert yaml.safe_load(block)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for module in re.findall(r"python -m ([\w.]+)", text):
        if module not in ("pip", "venv", "pytest", "build", "twine"):
            assert importlib.util.find_spec(module), f"{page.name}: no module {module}"
    for target in re.findall(r"`make ([\w-]+)`|^make ([\w-]+)", text, re.MULTILINE):
        assert set(target) & targets, f"{page.name}: make {target}"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts make them: lower case, hyphens, no punctuation."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", h)).lower().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", [*PAGES, *MORE], ids=by_name)
def test_links_lead_somewhere(page: Path) -> None:
    """Relative links, which are all that the site and a code host have in common."""
    text = re.sub(r"^```.*?^```|`[^`\n]+`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'<img src="([^"]+)"', text):
        if re.match(r"https?://|mailto:", target):
            continue
        file, _, anchor = target.partition("#")
        found = (page.parent / file) if file else page
        assert found.is_file(), f"{by_name(page)} links to {target}"
        assert not anchor or anchor in anchors(found), f"{by_name(page)}: no heading #{anchor} in {found.name}"


def test_a_page_that_is_wrong_is_noticed(tmp_path: Path) -> None:
    """The tests above can fail: a page with every mistake that they look for."""
    page = tmp_path / "wrong.md"
    page.write_text(
        "# A `page`, of mine\n\n<!-- given\na = 1\n-->\n\n```python\nassert a == 2\n```\n\n```text\n3\n```\n"
    )
    assert anchors(page) == {"a-page-of-mine"}
    assert parts(page) == [(4, "a = 1\n", None), (8, "assert a == 2\n", "3\n")]
    with pytest.raises(AssertionError):
        exec("".join(code for _, code, _ in parts(page)), {})
