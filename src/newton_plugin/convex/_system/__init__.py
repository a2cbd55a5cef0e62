"""One quadratic program in standard form: its rows, its factors and its KKT system."""
