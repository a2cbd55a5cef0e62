"""One batch of quadratic programs in standard form: its rows, its factors and its optimality (KKT) system."""
