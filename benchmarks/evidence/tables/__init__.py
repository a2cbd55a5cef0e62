"""The tables and pictures, from lines of results alone; a new table begins in ``write.py``."""
