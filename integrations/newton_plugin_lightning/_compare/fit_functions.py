"""A task from two functions: one makes the module, one the data."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from newton_plugin import ArgumentTypeError
from newton_plugin_lightning._bases import first_tree
from newton_plugin_lightning._compare.plan import Run
from newton_plugin_lightning._trees import tree_of

__all__ = ["FitFunctions"]


@dataclass(frozen=True)
class FitFunctions:
    """Calls both functions anew for each run.

    Attributes:
        make_module: returns a LightningModule.
        make_data: returns a LightningDataModule, or loaders as ``Trainer.fit`` takes them; None: the module has them.
        trainer_kwargs: of the Trainer; callbacks are made by a function without arguments, anew for each run.
    """

    make_module: Callable[[], Any]
    make_data: Callable[[], Any] | None
    trainer_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("make_module", "make_data"):
            value = getattr(self, name)
            if not callable(value) and not (name == "make_data" and value is None):
                raise ArgumentTypeError(
                    f"{name} must be a function without arguments, called anew for each run; got "
                    f"{type(value).__name__}. Write a function that makes it."
                )
        callbacks = self.trainer_kwargs.get("callbacks")
        if callbacks is not None and not callable(callbacks):
            raise ArgumentTypeError(
                "callbacks must be a function that returns a list, because each run needs callbacks of its own; got "
                f"{type(callbacks).__name__}. Write callbacks=lambda: [...], or name a function."
            )

    def identity(self) -> dict[str, str]:
        """What is trained, in the words that a file can keep."""
        options = {key: _named(value) for key, value in sorted(self.trainer_kwargs.items())}
        return {"module": _named(self.make_module), "data": _named(self.make_data), "trainer": repr(options)}

    def fit(self, run: Run, callbacks: list[Any], options: dict[str, Any]) -> Any:
        """See :class:`~newton_plugin_lightning._compare.one_run.Task`."""
        importlib.import_module(first_tree()).seed_everything(run.seed, workers=True)
        module = self.make_module()
        data = None if self.make_data is None else self.make_data()
        tree = tree_of(type(module))
        if tree is None:
            raise ArgumentTypeError(f"make_module must return a LightningModule; got {type(module).__name__}.")
        own = self.trainer_kwargs.get("callbacks")
        kept = [] if own is None else list(own())
        settings = {**self.trainer_kwargs, **options, "callbacks": [*kept, *callbacks]}
        trainer = importlib.import_module(tree).Trainer(**settings)
        if isinstance(data, importlib.import_module(tree).LightningDataModule):
            trainer.fit(module, datamodule=data)
        elif isinstance(data, tuple):
            trainer.fit(module, *data)
        else:
            trainer.fit(module, data)
        return trainer


def _named(value: Any) -> str:
    """A name that is the same in every process: no addresses."""
    if isinstance(value, (str, int, float, bool, type(None), list, tuple, dict)):
        return repr(value)
    if isinstance(value, functools.partial):
        given = [*map(_named, value.args), *(f"{key}={_named(v)}" for key, v in sorted(value.keywords.items()))]
        return f"{_named(value.func)}({', '.join(given)})"
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"
