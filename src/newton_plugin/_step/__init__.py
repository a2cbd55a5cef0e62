"""The step of one loss, and how it enters the network.

``settings`` validates the arguments of all doors. ``rule`` is one boundary's curvature, damping and counters.
``engine`` takes the steps of a loss; ``senders`` and ``splice`` send them into the network in place of the gradient.
``surrogate`` is the quadratic loss whose gradient the step is.
"""
