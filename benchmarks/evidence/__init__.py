"""The evidence: do Newton Losses help, where, how much? By benchmarks/PROTOCOL.md.

Three ideas carry the package. A *problem* (``problems``) is a loss with data and a network; an *arm*
(``training.arms``) is a way to train on it; a *run* (``training.runs``) is one training, and leaves one JSON line. Runs
of one problem and arm that differ in seed, learning rate or damping are *replicas*, trained side by side in one process
(``training.replicas``). Tables are made from the lines alone (``tables``).

Imports run in one direction: ``data`` <- ``problems`` <- ``rules`` <- ``training`` <- ``bilevel_lists``, ``live`` <-
``tables``.
"""
