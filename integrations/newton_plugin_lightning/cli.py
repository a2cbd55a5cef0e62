"""``python -m newton_plugin_lightning``: Lightning's own command line, on whichever Lightning is installed.

Model, data and callbacks are named in the configuration (``class_path``), so there is nothing to write:

    python -m newton_plugin_lightning fit --config examples/rank_digits.yaml
    python -m newton_plugin_lightning fit --trainer.callbacks.help=newton_plugin_lightning.NewtonLosses
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from newton_plugin import NewtonPluginError
from newton_plugin_lightning._bases import first_tree

__all__ = ["main", "run"]


def run(args: list[str] | None = None) -> Any:
    """Run a subcommand (fit, validate, test, predict) and return the LightningCLI.

    The resolved configuration is saved beside the logger's files; without a logger it is not saved.

    Args:
        args: the command line's arguments; those of this process if not given.
    """
    tree = first_tree()
    lightning, cli = importlib.import_module(tree), importlib.import_module(f"{tree}.cli")

    class SaveConfigBesideLogs(cli.SaveConfigCallback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            if trainer.loggers:
                super().setup(trainer, pl_module, stage)

    return cli.LightningCLI(
        lightning.LightningModule,
        lightning.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=SaveConfigBesideLogs,
        save_config_kwargs={"overwrite": True},
        args=args,
    )


def main(args: list[str] | None = None) -> int:
    """:func:`run`; errors of this package are printed in one line, without a traceback. Returns the exit status."""
    try:
        run(args)
    except Exception as error:
        ours = _first_of_ours(error)
        if ours is None:
            raise
        print(f"error: {ours}", file=sys.stderr)
        return 2
    return 0


def _first_of_ours(error: BaseException | None) -> NewtonPluginError | None:
    """The error, or the one it was raised from, that is ours: jsonargparse wraps the errors of constructors."""
    while error is not None and not isinstance(error, NewtonPluginError):
        error = error.__cause__
    return error
