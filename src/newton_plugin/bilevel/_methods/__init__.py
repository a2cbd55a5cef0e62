"""The optimizers, one file each; optimizer.py is what they share, options.py the arguments of their constructors."""
