"""Which ``newton_plugin`` the interpreter has found."""

from __future__ import annotations

import functools
import hashlib
import sysconfig
from pathlib import Path

import torch

import newton_plugin

__all__ = ["describe", "installed"]


@functools.cache
def installed() -> dict[str, str]:
    """Version, a hash of the package's source files, where it came from, and the version of torch. No path is in it."""
    folder = Path(newton_plugin.__file__).resolve().parent
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py"), key=lambda f: f.relative_to(folder).as_posix()):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0")
        digest.update(file.read_bytes() + b"\0")
    libraries = {Path(sysconfig.get_paths()[k]).resolve() for k in ("purelib", "platlib")}
    return {
        "version": newton_plugin.__version__,
        "hash": digest.hexdigest()[:16],
        "from": "site-packages" if folder.parent in libraries else "a source tree",
        "torch": str(torch.__version__),
    }


def describe(package: dict[str, str]) -> str:
    """In one line."""
    return "newton_plugin {version}, source {hash}, from {from}, torch {torch}".format(**package)
