"""Where the model's outputs meet the loss.

``search`` turns the argument ``boundary=`` into finders, asks them, and says which boundaries are free. ``by_graph`` is
the finder of ``boundary="auto"``: it decides which operations a boundary is moved over, and ``layers`` which operations
are layers (``opaque``: those whose insides nobody sees). ``by_name`` holds the finders of names that users give;
``finder`` is what all share. ``autograd_graph`` reads PyTorch's graph and decides nothing; ``rows`` sees outputs of any
shape as rows (N, m).
"""
