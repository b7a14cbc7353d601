"""Data sets and their federation. NumPy only; heavier readers are imported where they are used."""

from fedgalore_jax.data.dataset import IGNORE, Dataset, Generation, Source, Split
from fedgalore_jax.data.federated import FederatedData, Plan
from fedgalore_jax.data.partition import PARTITIONS, partition

__all__ = [
    "IGNORE",
    "PARTITIONS",
    "Dataset",
    "FederatedData",
    "Generation",
    "Plan",
    "Source",
    "Split",
    "partition",
]
