"""Warnings of other packages on a device (deprecated names, cuBLAS without a context) are shown; ours are errors."""

from __future__ import annotations

import pytest

_FILTERS = ("default", "ignore:`isinstance.treespec", "error:newton_plugin", "error:NewtonLosses")


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.filterwarnings(*_FILTERS))
