"""Newton Losses for PyTorch: second-order steps at the loss boundary."""

__version__ = "0.1.0"

__all__ = ["__version__"]
