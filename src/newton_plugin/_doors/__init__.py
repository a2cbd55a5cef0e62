"""How a loss comes in: as a tensor, as a function, or once."""
