"""Where the model's outputs meet the loss.

``search`` turns the argument ``boundary=`` into finders, asks them, and says which boundaries are free. ``by_graph`` is
the finder of ``boundary="auto"``, ``by_name`` holds those of a name; ``finder`` is what they share. ``autograd_graph``
reads PyTorch's graph, ``rows`` sees outputs of any shape as rows (N, m).
"""
