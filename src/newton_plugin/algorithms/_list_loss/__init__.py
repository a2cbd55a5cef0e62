"""The ranking loss of one list, with its gradient and Hessian written out (row_loss.py)."""
