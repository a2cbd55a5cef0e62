"""The rules: candidates of the search for a better step, each from per-sample gradients to steps."""
