"""ConvexLayer: any smooth convex program."""
