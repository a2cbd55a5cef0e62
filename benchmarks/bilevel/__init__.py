"""Bilevel methods at equal cost, and beside TorchOpt: ``python -m benchmarks.bilevel``."""
