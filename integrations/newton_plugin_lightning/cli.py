"""``python -m newton_plugin_lightning``: Lightning's own command line, on the Lightning that the module belongs to.

Model, data and callbacks are named in the configuration (``class_path``), so there is nothing to write:

    python -m newton_plugin_lightning fit --config examples/rank_digits.yaml
    python -m newton_plugin_lightning fit --trainer.callbacks.help=newton_plugin_lightning.NewtonLosses
    python -m newton_plugin_lightning compare --config examples/compare.yaml --metric val/full --mode max --out runs
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from newton_plugin_lightning._cli_errors import in_one_line
from newton_plugin_lightning._lightning_cli import lightning_cli
from newton_plugin_lightning._trees import configured_tree

__all__ = ["main", "run"]


def run(args: list[str] | None = None) -> Any:
    """Run a subcommand (fit, validate, test, predict) and return the LightningCLI.

    The resolved configuration is saved beside the logger's files; without a logger it is not saved.

    Args:
        args: the command line's arguments; those of this process if not given.
    """
    return lightning_cli(configured_tree(sys.argv[1:] if args is None else args), args, exit_on_error=False)


def main(args: Sequence[str] | None = None) -> int:
    """:func:`run`, or a command of ours. Errors in arguments and of this package are printed in one line, without a
    traceback. Returns the exit status."""
    given = list(sys.argv[1:] if args is None else args)
    try:
        if given[:1] == ["compare"]:
            from newton_plugin_lightning._compare.command import command

            command(given[1:])
        elif given[:1] == ["look"]:
            from newton_plugin_lightning._look_command import look_command

            return look_command(given[1:])
        else:
            run(None if args is None else given)
    except Exception as error:
        line = in_one_line(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return 2
    return 0
