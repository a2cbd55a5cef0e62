"""First and second derivatives of a loss that has been computed, with respect to its outputs.

``autograd`` takes the gradients of the live graph, ``products`` its Hessian-vector products. ``closed_forms`` finds
Hessians that need no second differentiation; a new one begins there. ``sample_hessians`` holds the Hessians of a batch,
whatever is known of them, and adds them up. ``independence`` detects a loss that couples samples.
"""
