"""Which solver finds the active rows: our own, or one of another package."""
