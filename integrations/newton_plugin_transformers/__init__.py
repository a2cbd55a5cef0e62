"""Newton Losses in the Hugging Face Trainer: give it a loss function.

>>> from newton_plugin_transformers import NewtonTrainerLoss
>>> newton = NewtonTrainerLoss()  # Trainer(..., compute_loss_func=newton, callbacks=[newton])

``compute_loss_func`` makes the step; as a callback the same object adds its numbers to the Trainer's logs and its
running curvature to the checkpoints. Its former name, ``NewtonLosses``, still works and says so once.
"""

from newton_plugin_transformers._base import TransformersMissingError
from newton_plugin_transformers._former_names import former
from newton_plugin_transformers._losses import NewtonTrainerLoss

__all__ = ["NewtonTrainerLoss", "TransformersMissingError"]


def __getattr__(name: str) -> object:
    return former(name)
