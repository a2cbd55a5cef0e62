"""ConvexLayer: any smooth convex program.

layer.py is the module; find_point.py solves, by interior_point.py and then polish.py; program.py evaluates the
functions.
"""
