"""Data sets and their federation. NumPy only; heavier readers are imported where they are used."""

from fedgalore_jax.data.dataset import Dataset, Split
from fedgalore_jax.data.federated import FederatedData, Plan
from fedgalore_jax.data.partition import PARTITIONS, partition

__all__ = ["PARTITIONS", "Dataset", "FederatedData", "Plan", "Split", "partition"]
