"""From derivatives to the step: curvatures, damping, and what they keep from batch to batch."""
