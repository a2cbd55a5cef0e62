"""The Trainer's callback class; an error that says what to install where transformers is missing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from newton_plugin import NewtonPluginError

__all__ = ["CallbackBase", "TransformersMissingError"]


class TransformersMissingError(NewtonPluginError, ImportError):
    """``transformers`` is not installed."""


if TYPE_CHECKING:
    from transformers.trainer_callback import TrainerCallback as CallbackBase
else:
    try:
        from transformers.trainer_callback import TrainerCallback as CallbackBase
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise TransformersMissingError(
            "newton_plugin_transformers needs transformers, which is not installed. "
            "Install it: pip install 'newton-plugin[transformers]'."
        ) from None
