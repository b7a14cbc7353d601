"""Data sets and their federation. NumPy only; heavier readers are imported where they are used."""

from fedgalore_jax.data.buckets import split_by_length
from fedgalore_jax.data.dataset import IGNORE, Asked, Dataset, Generation, Source, Split
from fedgalore_jax.data.federated import FederatedData, Plan
from fedgalore_jax.data.padded import Rows
from fedgalore_jax.data.partition import PARTITIONS, partition

__all__ = [
    "IGNORE",
    "PARTITIONS",
    "Asked",
    "Dataset",
    "FederatedData",
    "Generation",
    "Plan",
    "Rows",
    "Source",
    "Split",
    "partition",
    "split_by_length",
]
