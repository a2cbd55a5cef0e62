"""Problems that the product meets in life: several outputs or terms, each run trained through the hook on a live loss.

The problems of ``problems`` have one output and rows that are independent, and are trained as stacks of replicas. These
have what a stack cannot hold: two heads, a KL term beside the outputs, a loss with derivatives of the network. So each
run is an ordinary loop of PyTorch with ``hook(loss).backward()``. Their lines and tables have the form of the others'.

Imports run in one direction: ``task`` <- ``regression``, ``two_heads``, ``vae``, ``pinn`` <- ``problems`` <- ``train``
<- ``plan``.
"""
