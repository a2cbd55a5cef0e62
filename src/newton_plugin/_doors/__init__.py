"""How a loss comes in: the doors of the package.

``loss_hook`` takes a loss that has been computed, ``newton_loss`` a loss function to wrap, ``newton_step`` a loss
function to step on once, ``functional_loss`` a loss function with its state as an argument. ``arguments`` finds the
outputs in a call, ``transformed`` is a wrapped loss under torch.func. ``running_states`` and ``layer_names`` give each
layer a running state of its own. For people: ``doubts`` words what is wrong or doubtful about what was found, ``found``
what was found, ``diagnostics`` the numbers of a step.
"""
