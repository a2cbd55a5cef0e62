"""Another version of the package beside the one in use, in one process, to be measured step by step in turn."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

__all__ = ["load"]


def load(source: Path) -> ModuleType:
    """``newton_plugin`` of another source folder. What its functions import when they run is of the version in use."""
    ours = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "newton_plugin"}
    for name in ours:
        del sys.modules[name]
    sys.path.insert(0, str(source))
    try:
        other = importlib.import_module("newton_plugin")
        importlib.import_module("newton_plugin._runtime.processes")
    finally:
        sys.path.remove(str(source))
        for name in [name for name in sys.modules if name.partition(".")[0] == "newton_plugin"]:
            del sys.modules[name]
        sys.modules.update(ours)
    assert other.__file__ is not None
    assert Path(other.__file__).is_relative_to(source)
    return other
