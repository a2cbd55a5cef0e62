"""The sorts that give a soft permutation matrix; a new one is a file here and a row in the table of methods.py."""
