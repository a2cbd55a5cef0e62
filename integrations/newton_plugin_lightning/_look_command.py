"""``python -m newton_plugin_lightning look``: a look at what a configuration of ``fit`` trains."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from newton_plugin.testing import LookReport
from newton_plugin_lightning._lightning_cli import lightning_cli
from newton_plugin_lightning._look import look
from newton_plugin_lightning._trees import configured_tree
from newton_plugin_lightning._untouched import quiet

__all__ = ["look_command"]


def look_command(args: list[str]) -> int:
    """``python -m newton_plugin_lightning look``: :func:`look` at what a configuration of ``fit`` trains."""
    given, rest = _parser().parse_known_args(args)
    options = {k: v for k, v in vars(given).items() if k != "picture"}
    found: list[LookReport] = []

    def instead_of_fit(cli: Any) -> None:
        def fit(model: Any, train_dataloaders: Any = None, datamodule: Any = None, **ignored: Any) -> None:
            found.append(look(cli.trainer, model, train_dataloaders, datamodule, **options))

        cli.fit = fit  # LightningCLI calls a method of its own in place of the Trainer's

    before, sys.argv = sys.argv, sys.argv[:1]
    try:
        tree = configured_tree(rest)
        with quiet():
            lightning_cli(tree, ["fit", *rest], before=instead_of_fit, save_config=False, exit_on_error=False)
    finally:
        sys.argv = before
    print(found[0])
    print("\nDecide by a comparison: python -m newton_plugin_lightning compare --help")
    if given.picture is not None:
        print(_drawn(found[0], given.picture))
    return 0


def _drawn(report: LookReport, path: Path) -> str:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return "No picture: it takes matplotlib, pip install matplotlib."
    figure = Figure(figsize=(11, 3.6))
    report.draw(figure)
    figure.savefig(path, dpi=120)
    return f"Picture: {path}"


def _parser() -> argparse.ArgumentParser:
    about = (
        "Runs a few dozen plain steps of what a configuration of `fit` trains, and says what is found under the loss, "
        "whether its derivatives are right, what the package would cost, and what to take. All other arguments are "
        "those of `fit`: --config mine.yaml. How to read what it prints: docs/look.md."
    )
    parser = argparse.ArgumentParser("python -m newton_plugin_lightning look", description=about, allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=40, help="plain steps to look at (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=15, help="steps to time with and without (default: %(default)s)")
    parser.add_argument("--picture", type=Path, help="file for the picture, such as look.png; needs matplotlib")
    parser.add_argument("--boundary", default="auto", help="as of NewtonLosses (default: %(default)s)")
    parser.add_argument("--reduction", default="mean", choices=["mean", "sum"], help="of the loss (default: mean)")
    parser.add_argument("--feature_dims", type=int, nargs="+", help="as of NewtonLosses")
    return parser
