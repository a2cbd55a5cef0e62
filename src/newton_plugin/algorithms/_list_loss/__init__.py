"""The ranking loss of one list with its derivatives written out."""
