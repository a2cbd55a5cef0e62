"""Every block of Python runs as it is pasted: by itself, in an empty namespace. It prints what stands below it."""

from __future__ import annotations

import contextlib
import io
import re

import pytest
from tests.reader import ROOT, masked, parts

PAGES = ("README.md", "docs/first-five-minutes.md", "docs/tour.md", "docs/integrations.md")
BLOCKS = [
    pytest.param(page, line, code, printed, id=f"{page}, line {line}")
    for page in PAGES
    for line, code, printed in parts(ROOT / page)
]


@pytest.mark.parametrize(("page", "line", "code", "printed"), BLOCKS)
def test_a_block_as_it_is_pasted(page: str, line: int, code: str, printed: str | None) -> None:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile("\n" * (line - 1) + code, page, "exec", dont_inherit=True), {"__name__": "__main__"})
    if printed is not None and out.getvalue():
        assert masked(out.getvalue()) == masked(printed)


def test_no_block_is_left_out() -> None:
    for page in PAGES:
        text = (ROOT / page).read_text()
        assert text.count("```python") == sum(param.values[0] == page for param in BLOCKS)
        assert "<!-- given" not in text  # what a reader does not see


def test_the_readme_is_short() -> None:
    words = re.sub(r"^```.*?^```", "", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE).split()
    assert len(words) <= 750
