"""The solver in torch: a batch of dense quadratic programs by active sets."""
