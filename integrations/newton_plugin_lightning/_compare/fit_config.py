"""A task from a configuration: the very one that ``fit`` takes, through Lightning's own command line."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from newton_plugin_lightning._callback import NewtonLosses
from newton_plugin_lightning._compare.alone import alone
from newton_plugin_lightning._compare.plan import Run
from newton_plugin_lightning._lightning_cli import lightning_cli
from newton_plugin_lightning._trees import configured_tree

__all__ = ["FitConfig", "Read", "read_config"]

# Callbacks that need a logger, a progress bar or a summary, which are off.
_LEFT_OUT = {"LearningRateMonitor", "DeviceStatsMonitor", "ProgressBar", "ModelSummary"}
_OFF = {"logger", "enable_progress_bar", "enable_model_summary", "devices", "num_nodes", "strategy"}
_CHECKPOINTS = {"enable_checkpointing", "default_root_dir"}


@dataclass(frozen=True)
class Read:
    """What a configuration says.

    Attributes:
        identity: all that is trained, part by part, without the seed, what is off, and this package's callbacks.
        yours: the arguments of each ``NewtonLosses`` in it.
        left_out: the names of other callbacks that are taken out.
    """

    identity: dict[str, str]
    yours: list[dict[str, Any]]
    left_out: list[str]


@dataclass(frozen=True)
class FitConfig:
    """Runs ``fit`` with the given arguments, changed only where the arms differ.

    Attributes:
        args: as ``fit`` takes them: ``--config mine.yaml --model.lr=0.1``.
        keep_checkpoints: leave the configuration's callbacks for checkpoints in.
    """

    args: Sequence[str]
    keep_checkpoints: bool = False

    def fit(self, run: Run, callbacks: list[Any], options: dict[str, Any]) -> Any:
        """See :class:`~newton_plugin_lightning._compare.one_run.Task`."""

        def change(cli: Any) -> None:
            trainer = cli.config["fit"]["trainer"]
            newton, kept, _ = _sorted_out(trainer.get("callbacks"), self.keep_checkpoints)
            trainer["callbacks"] = [*kept, *(newton if run.arm.kind == "yours" else [])]
            for name, value in options.items():
                trainer[name] = value

        args = ["fit", *self.args, f"--seed_everything={run.seed}"]
        return lightning_cli(configured_tree(self.args), args, change, callbacks, save_config=False).trainer


def read_config(args: Sequence[str], keep_checkpoints: bool = False) -> Read:
    """Parse the arguments of ``fit`` and make nothing from them.

    Raises:
        jsonargparse's ArgumentError: a wrong argument.
    """
    try:
        with alone():
            lightning_cli(configured_tree(args), ["fit", *args, "--seed_everything=0"], _stop, exit_on_error=False)
    except _Parsed as parsed:
        config = parsed.cli.config["fit"]
        newton, _, left_out = _sorted_out(config["trainer"].get("callbacks"), keep_checkpoints)
        return Read(_identity(parsed.cli), [_arguments(callback) for callback in newton], left_out)
    raise AssertionError("Lightning's command line always calls before_instantiate_classes")


class _Parsed(Exception):
    """Leaves Lightning's command line before anything is made."""

    def __init__(self, cli: Any) -> None:
        super().__init__()
        self.cli = cli


def _stop(cli: Any) -> None:
    raise _Parsed(cli)


def _identity(cli: Any) -> dict[str, str]:
    text = cli.parser.dump(cli.config, skip_link_targets=False, skip_none=False, format="yaml")
    parts: dict[str, Any] = yaml.safe_load(text)["fit"]
    for name in ("config", "seed_everything"):
        parts.pop(name, None)
    trainer = {key: value for key, value in parts.pop("trainer").items() if key not in _OFF | _CHECKPOINTS}
    listed = _as_list(trainer.pop("callbacks", None))
    others = [c for c in listed if not issubclass(_class_of(c), NewtonLosses)]
    parts |= {"trainer": trainer, "callbacks": others}
    return {name: json.dumps(value, sort_keys=True) for name, value in parts.items() if value}


def _sorted_out(callbacks: Any, keep_checkpoints: bool) -> tuple[list[Any], list[Any], list[str]]:
    """The configured callbacks: ours, those that stay, and the names of those that are taken out."""
    newton, kept, left_out = [], [], []
    unwanted = _LEFT_OUT if keep_checkpoints else _LEFT_OUT | {"Checkpoint"}
    for callback in _as_list(callbacks):
        kind = _class_of(callback)
        if issubclass(kind, NewtonLosses):
            newton.append(callback)
        elif unwanted & {base.__name__ for base in kind.__mro__}:
            left_out.append(kind.__name__)
        else:
            kept.append(callback)
    return newton, kept, left_out


def _as_list(callbacks: Any) -> list[Any]:
    if callbacks is None:
        return []
    return list(callbacks) if isinstance(callbacks, list) else [callbacks]


def _class_of(callback: Any) -> type:
    module, _, name = callback["class_path"].rpartition(".")
    return getattr(importlib.import_module(module), name)


def _arguments(callback: Any) -> dict[str, Any]:
    arguments = callback.get("init_args") or {}
    return arguments if isinstance(arguments, dict) else arguments.as_dict()
