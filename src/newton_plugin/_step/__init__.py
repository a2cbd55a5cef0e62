"""The step of one loss, and how it enters the network."""
