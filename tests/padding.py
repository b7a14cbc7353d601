"""More padding than a split needs, which nothing may notice."""

import numpy as np

from fedgalore_jax.data import IGNORE, Split
from fedgalore_jax.data.buckets import SEQUENCES


def widen(split: Split, length: int, pad_token: int) -> Split:
    """The same samples, padded on the right to `length`."""

    def wide(x, value):
        return np.pad(x, ((0, 0), (0, length - x.shape[1])), constant_values=value)

    fill = {"input_ids": pad_token}
    inputs = {k: wide(x, fill.get(k, 0)) if k in SEQUENCES else x for k, x in split.inputs.items()}
    return Split(inputs, wide(split.labels, IGNORE) if split.labels.ndim == 2 else split.labels)
