"""Lightning's command line with our settings: model and data by class path, the configuration beside the logs."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["lightning_cli"]


def lightning_cli(
    tree: str,
    args: Sequence[str] | None,
    before: Callable[[Any], None] | None = None,
    callbacks: Sequence[Any] = (),
    save_config: bool = True,
    exit_on_error: bool = True,
) -> Any:
    """Parse and run a subcommand, and return the LightningCLI.

    Args:
        tree: import name of the Lightning to run on.
        args: the command line's arguments; None: those of this process.
        before: called with the CLI when all is parsed and nothing is made; may change its ``config``.
        callbacks: instances that the Trainer gets beside those of the configuration.
        save_config: write the resolved configuration beside the logger's files; without a logger nothing is written.
        exit_on_error: print errors of parsing with the usage and exit; False: raise them.
    """
    lightning, cli = importlib.import_module(tree), importlib.import_module(f"{tree}.cli")

    class SaveConfigBesideLogs(cli.SaveConfigCallback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            if trainer.loggers:
                super().setup(trainer, pl_module, stage)

    class CLI(cli.LightningCLI):
        def parse_arguments(self, parser: Any, args: Any) -> None:
            try:
                super().parse_arguments(parser, args)
            except argparse.ArgumentError as error:  # to say which option was meant
                parsers = getattr(self, "_subcommand_parsers", {}).values()
                vars(error)["options"] = [option for one in parsers for option in one._option_string_actions]
                raise

        def before_instantiate_classes(self) -> None:
            if before is not None:
                before(self)

    return CLI(
        lightning.LightningModule,
        lightning.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=SaveConfigBesideLogs if save_config else None,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"callbacks": list(callbacks)} if callbacks else None,
        parser_kwargs={"exit_on_error": exit_on_error},
        args=args,
    )
