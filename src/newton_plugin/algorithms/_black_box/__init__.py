"""Functions that autograd cannot see through: smoothed, perturbed, and in Fenchel-Young losses, by noisy copies."""
