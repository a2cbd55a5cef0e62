"""Newton Losses in Lightning: add a callback to the Trainer."""
