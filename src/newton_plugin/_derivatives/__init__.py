"""First and second derivatives of a loss that has been computed, with respect to its outputs."""
