"""Where the model's outputs meet the loss.

``search`` turns the argument ``boundary=`` into finders, asks them, and says which boundaries are free. ``by_name``
holds the finders of names that users give; ``by_graph`` is the finder of ``boundary="auto"``; ``finder`` is what all
share. The finder of the graph takes these steps:

1. ``layers`` says which operations are layers, where outputs end (``weights``: which factors are weights;
   ``operations``: their names; ``opaque``: those whose insides nobody sees).
2. ``towards_loss`` moves each boundary over what belongs to the model: views, biases, stacks.
3. ``nested`` looks at outputs that were computed from one another: the step belongs where their paths to the loss meet
   (``dominators``), unless they meet as ``terms`` of the loss, which are added.
4. ``axes`` says which dimension counts the samples, where it is not the first; ``parts`` names losses that take the
   rows list by list.
5. ``beside`` lists what the loss reaches without passing a boundary; ``names`` says what parameters and layers are
   called; ``owner``, whose outputs a tensor holds (``numbered``: by which parameters).

``autograd_graph`` reads PyTorch's graph and decides nothing; ``marks`` are left on the node of a loss; ``rows`` sees
outputs of any shape as rows (N, m).
"""
