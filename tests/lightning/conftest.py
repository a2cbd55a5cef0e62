"""Everything here runs under both Lightnings."""

from __future__ import annotations

import importlib
from typing import Any

import pytest


@pytest.fixture(params=["pytorch_lightning", "lightning.pytorch"])
def pl(request: pytest.FixtureRequest) -> Any:
    """A Lightning, by its import name."""
    return importlib.import_module(request.param)
