"""Newton Losses in Lightning: add a callback to the Trainer.

>>> from newton_plugin_lightning import NewtonLosses
>>> callback = NewtonLosses()  # Trainer(callbacks=[callback])

Both ``pytorch_lightning`` and ``lightning.pytorch`` are supported, whichever is installed; the same callback
goes into either Trainer.
"""

import difflib

from newton_plugin_lightning._bases import LightningMissingError
from newton_plugin_lightning._callback import NewtonLosses
from newton_plugin_lightning._compare.comparison import compare
from newton_plugin_lightning._compare.errors import ComparisonError
from newton_plugin_lightning._look import look
from newton_plugin_lightning._path_metrics import CostRatio, PathAccuracy
from newton_plugin_lightning._rank_accuracy import RankAccuracy

__all__ = [
    "ComparisonError",
    "CostRatio",
    "LightningMissingError",
    "NewtonLosses",
    "PathAccuracy",
    "RankAccuracy",
    "compare",
    "look",
]


def __getattr__(name: str) -> object:
    """Raise for a missing name, with the name that was meant: jsonargparse shows this for a wrong ``class_path``."""
    meant = difflib.get_close_matches(name, __all__, n=1)
    hint = f"; did you mean {meant[0]!r}?" if meant else ""
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
