"""From lines of results to tables and pictures; a new table begins in write.py."""
