"""Newton Losses in Lightning: add a callback to the Trainer.

>>> from newton_plugin_lightning import NewtonLosses
>>> callback = NewtonLosses()  # Trainer(callbacks=[callback])

Both ``pytorch_lightning`` and ``lightning.pytorch`` are supported, whichever is installed; the same callback
goes into either Trainer.
"""

from newton_plugin_lightning._bases import LightningMissingError
from newton_plugin_lightning._callback import NewtonLosses
from newton_plugin_lightning._metrics import RankAccuracy
from newton_plugin_lightning._path_metrics import CostRatio, PathAccuracy

__all__ = ["CostRatio", "LightningMissingError", "NewtonLosses", "PathAccuracy", "RankAccuracy"]
