"""Where the model's outputs meet the loss: found in the autograd graph, or by name."""
