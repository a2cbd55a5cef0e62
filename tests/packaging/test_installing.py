"""What `make demo` tells while pip installs."""

from __future__ import annotations

import doctest

import pytest
from examples import installing


def test_what_pip_prints_is_told_in_a_line() -> None:
    failed, attempted = doctest.testmod(installing)
    assert attempted > 0
    assert failed == 0


def test_the_status_is_that_of_pip(capfd: pytest.CaptureFixture[str]) -> None:
    assert installing.main(["--dry-run", "--no-index", "pip"]) == 0  # is there
    assert "1 packages found: pip" in capfd.readouterr().out
    assert installing.main(["--no-index", "--find-links", "nowhere", "no-such-package-of-ours"]) != 0
    assert "no-such-package-of-ours" in capfd.readouterr().err
