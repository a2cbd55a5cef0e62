"""What the package needs to know of the surroundings in which torch runs.

``processes`` averages over the ranks of a data-parallel run, ``cuda_graphs`` keeps steps repeatable in a captured
graph, ``compiler`` keeps them out of compiled regions, ``fabric`` takes our own backward passes past Fabric's guard.
"""
