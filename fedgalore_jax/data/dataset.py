"""A data set in memory."""

from typing import NamedTuple

import numpy as np


class Split(NamedTuple):
    """Samples.

    Attributes:
      inputs: model inputs by their Hugging Face names, each `[n, ...]`.
      labels: `[n]`.
    """

    inputs: dict[str, np.ndarray]
    labels: np.ndarray


class Dataset(NamedTuple):
    """Three splits: tuning and model selection look at `validation`, never at `test`."""

    train: Split
    validation: Split
    test: Split
    num_labels: int
