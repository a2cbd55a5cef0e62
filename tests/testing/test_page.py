"""docs/check-loss.md: its code runs, and prints what the page says it prints (but for rounding)."""

from __future__ import annotations

import contextlib
import doctest
import io
import re
from pathlib import Path
from typing import Any

import newton_plugin.testing
import newton_plugin.testing._check

PAGE = (Path(__file__).parent.parent.parent / "docs" / "check-loss.md").read_text()
BLOCKS = re.findall(r"<!-- run -->\n```python\n(.*?)```\n(?:.*?)```text\n(.*?)```", PAGE, re.DOTALL)


def masked(text: str) -> str:
    """Without rounding errors, which differ between machines; other numbers with two decimals."""
    return re.sub(r"(\d\.\d\d)\d+", r"\1", re.sub(r"\d+e[-+]\d+", "#", text)).strip()


def test_the_page_is_true() -> None:
    names: dict[str, Any] = {}
    for code, printed in BLOCKS:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(code, names)
        assert masked(out.getvalue()) == masked(printed)
    assert PAGE.count("```python") == len(BLOCKS) == 2


def test_examples_in_docstrings() -> None:
    for module in (newton_plugin.testing, newton_plugin.testing._check):
        failed, attempted = doctest.testmod(module)
        assert attempted > 0
        assert failed == 0
