"""First and second derivatives of a loss with respect to its outputs.

``autograd`` takes the gradients of the live graph, ``products`` its Hessian-vector products, ``functional`` both of a
loss function by ``torch.func``. ``closed_forms`` finds Hessians that need no second differentiation; a new one begins
there. ``sample_hessians`` holds the Hessians of a batch, whatever is known of them, and adds them up. ``independence``
detects a loss that couples samples.
"""
