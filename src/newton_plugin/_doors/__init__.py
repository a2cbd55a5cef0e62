"""How a loss comes in: the three doors of the package.

``loss_hook`` takes a loss that has been computed, ``newton_loss`` a loss function to wrap, ``newton_step`` a loss
function to step on once. ``running_states`` and ``layer_names`` give each layer a running state of its own. For people:
``doubts`` words what is wrong or doubtful about what was found, ``found`` what was found, ``diagnostics`` the numbers
of a step.
"""
