"""The data: images of digits, lists and numbers written in them, and the noise that a loss draws."""
