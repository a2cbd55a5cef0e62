"""Every rule that is compared, and the candidates that were tried."""
