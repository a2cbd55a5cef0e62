"""``pip install`` that says in one line how far it is, for ``make demo``; needs Python and pip alone.

python -m examples.installing -c constraints.txt -e ".[examples]"
"""

import re
import subprocess
import sys
from collections.abc import Callable, Iterable

_FOUND = re.compile(r"(?:Collecting|Requirement already satisfied:) ([\w.-]+)")
_FETCHED = re.compile(r"\s*(?:Downloading|Using cached) ([\w.]+)-\S+ \((.+)\)")


def told(lines: Iterable[str], show: Callable[[str], object]) -> None:
    """Reads what pip prints, and says what it means.

    >>> lines = ["Collecting torch>=2.6 (from a)", "  Downloading torch-2.13.0-cp311.whl (180 MB)", "Collecting numpy"]
    >>> told([*lines, "Installing collected packages: numpy, torch", "Successfully installed numpy-1 torch-2"], print)
      1 packages found: torch
      1 packages found: downloading torch, 180 MB
      2 packages found: numpy
      unpacking 2 packages
      installed
    """
    names: set[str] = set()
    for line in lines:
        found, fetched = _FOUND.match(line), _FETCHED.match(line)
        if found:
            names.add(found[1])
            show(f"  {len(names)} packages found: {found[1]}")
        elif fetched:
            show(f"  {len(names)} packages found: downloading {fetched[1]}, {fetched[2]}")
        elif line.startswith("Installing collected packages: "):
            show(f"  unpacking {line.count(',') + 1} packages")
        elif line.startswith("Successfully installed"):
            show("  installed")


def main(arguments: list[str]) -> int:
    """Install; pip's exit status. On a terminal the line stays where it is, elsewhere every tenth is printed."""
    terminal = sys.stdout.isatty()
    count = 0

    def show(text: str) -> None:
        nonlocal count
        count += 1
        if terminal:
            print(f"\r\033[K{text}", end="", flush=True)
        elif "found" not in text or "downloading" in text or count % 10 == 1:
            print(text, flush=True)

    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told(process.stdout, show)
    if terminal:
        print()
    return process.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
