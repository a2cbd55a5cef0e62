"""Training: which runs a table needs (``plan.py``), and how they are trained (``train.py``)."""
