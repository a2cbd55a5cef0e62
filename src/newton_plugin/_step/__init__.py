"""The step of one loss, and how it enters the network.

**The arithmetic**, the same for every door: ``settings`` validates arguments and makes rules. ``rule`` is one
boundary's step, ``running_state`` what it keeps. ``one_layer`` goes from gradients to the step of a layer, ``rows``
counts its samples, ``size`` is the one size of a loss of several terms. ``surrogate`` is the quadratic loss whose
gradient the step is.

**On a live graph**: ``ends`` holds the boundaries of a loss. ``engine`` decides when a step is made: at once
(``compute``), or in the backward pass. ``senders`` and ``splice`` send it into the network in place of the gradient,
``compiled`` in a few kernels. ``sharing`` finds out whether other terms use the loss's operations. ``exchange`` and
``lagged`` are what travels between processes.

**As a pure function**: ``pure`` takes states and gives them back, ``states`` makes, saves and loads them, ``attach``
returns the loss whose derivative is the step.
"""
