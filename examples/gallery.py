"""The pictures of the documents, made anew.

    python -m examples.gallery                 # all of them, into docs/img
    python -m examples.gallery --only damping_sweep --out /tmp

Pictures of measured runs are drawn from the rows in benchmarks/results, all others are computed here.
"""

import argparse
from importlib import import_module
from pathlib import Path

import torch

PICTURES = ("landscape", "gradients", "training_curves", "damping_sweep", "eigenvalues")
IMAGES = Path(__file__).parents[1] / "docs" / "img"


def main(arguments: list[str] | None = None) -> list[Path]:
    """Draw; return the files that were written."""
    parser = argparse.ArgumentParser(prog="python -m examples.gallery", description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PICTURES, default=PICTURES, help="some of them")
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder (default: docs/img)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    files = []
    for name in options.only:
        files.append(options.out / f"{name}.png")
        report = import_module(f"examples.plots.{name}").draw(files[-1])
        print(f"{files[-1]}, {files[-1].stat().st_size / 1e3:.0f} kB", report or "", sep="\n  " if report else "")
    return files


if __name__ == "__main__":
    main()
