"""The same for one problem at a time, compiled by numba."""
