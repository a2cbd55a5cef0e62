"""NeuralSort, SoftSort, and the table in which a sort is registered (methods.py)."""
