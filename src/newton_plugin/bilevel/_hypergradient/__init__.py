"""The gradient of an upper loss through the solution of a lower one."""
