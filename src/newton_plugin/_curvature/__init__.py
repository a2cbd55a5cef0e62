"""From derivatives to the step ``(C + damping I)^-power g``.

``protocol`` says what a curvature is; a new one is a file beside ``fisher``, ``soft_normalization``, ``hessian`` and
``auto``, and its name stands in ``_step/settings``. ``hessian`` chooses between ``hessian_mean`` and
``hessian_per_sample``. ``damping`` says how much is added to C; a new rule begins there. ``running_mean`` and
``refresh`` are what is kept from step to step. ``finiteness`` decides whether a step is taken, and ``sizes`` at which
sizes C is computed in another way.
"""
