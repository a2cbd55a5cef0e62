"""Differentiable quadratic programs beside other layers: ``python -m benchmarks.qp_layers``."""
