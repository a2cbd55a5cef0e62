"""The step of one loss, and how it enters the network.

``settings`` validates the arguments of all doors. ``rule`` is one boundary's curvature, damping and counters. ``ends``
holds the boundaries of one loss. ``engine`` decides when a step is made: at once (``compute``, with one ``size`` for
losses of several terms), or in the backward pass. ``senders`` and ``splice`` send it into the network in place of the
gradient; ``sharing`` finds out whether other terms use the loss's operations. ``surrogate`` is the quadratic loss whose
gradient the step is.
"""
