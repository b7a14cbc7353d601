"""FedGaLore in JAX."""
