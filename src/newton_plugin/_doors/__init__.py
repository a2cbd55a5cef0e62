"""How a loss comes in: the three doors of the package.

``loss_hook`` takes a loss that has been computed, ``newton_loss`` a loss function to wrap, ``newton_step`` a loss
function to step on once. ``diagnostics`` makes the numbers that people and loggers read of a step.
"""
