"""Symmetric matrices in every way they are stored, and their damped inverses ``(C + d I)^-p g``.

``matrices`` holds C in full, as a diagonal or as a multiple of the identity; ``diagonal_rank_one`` and
``diagonal_low_rank`` hold that of cross-entropy; ``sketch`` holds one that is too large to form. ``damped_inverse``
solves densely, ``krylov`` from products with vectors. ``large_rows`` is arithmetic on gradients too large to copy.
"""
