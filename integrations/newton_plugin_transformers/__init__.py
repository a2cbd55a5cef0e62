"""Newton Losses in the Hugging Face Trainer: give it a loss function.

>>> from newton_plugin_transformers import NewtonLosses
>>> newton = NewtonLosses()  # Trainer(..., compute_loss_func=newton, callbacks=[newton])

``compute_loss_func`` makes the step; as a callback the same object adds its numbers to the Trainer's logs and its
running curvature to the checkpoints.
"""

from newton_plugin_transformers._base import TransformersMissingError
from newton_plugin_transformers._losses import NewtonLosses

__all__ = ["NewtonLosses", "TransformersMissingError"]
