"""The problems: one file for each kind of loss; ``registry.py`` has all of them by name."""
