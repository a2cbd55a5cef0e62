"""What the package needs to know of the surroundings in which torch runs.

``processes`` averages over the ranks of a data-parallel run, ``agreement`` tells whether they agree. ``cuda_graphs``
keeps steps repeatable in a captured graph, ``compiler`` keeps them out of compiled regions, ``transforms`` says what
``vmap`` and the compiler let be seen, ``members`` keeps tensors for each member of a ``vmap``. ``fabric`` takes our own
backward passes past Fabric's guard.
"""
