"""FedGaLore in JAX: federated fine-tuning in gradient subspaces.

Importing this package brings in jax and optax only, with the two parts that stand alone:
`fedgalore_jax.galore.galore`, an optax transform, and `fedgalore_jax.shared_signal.ajive`. The rest is
imported by name: `fedgalore_jax.strategies`, `fedgalore_jax.models`, `fedgalore_jax.train`.
"""

from fedgalore_jax import galore, shared_signal

__all__ = ["galore", "shared_signal"]
