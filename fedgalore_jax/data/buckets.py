"""Few static lengths for many true ones, so that few programs are compiled."""

from typing import Any

import numpy as np

from fedgalore_jax.data.dataset import Split
from fedgalore_jax.data.padded import Padded

LENGTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
SEQUENCES = ("input_ids", "attention_mask", "token_type_ids")
"""Inputs with a length axis; labels `[n, L]` have it too."""


def bucket(length: int) -> int:
    """The smallest of the static lengths that holds `length` tokens; multiples of 256 above 512.

    >>> bucket(17), bucket(512), bucket(600)
    (32, 512, 768)
    """
    return next((b for b in LENGTHS if length <= b), -(-length // 256) * 256)


def pad_left(rows: list, length: int, value: int) -> np.ndarray:
    """Rows of different lengths as one `[n, length]` int32 array that ends with them."""
    out = np.full((len(rows), length), value, np.int32)
    for target, row in zip(out, rows, strict=True):
        target[length - len(row) :] = row
    return out


def split_by_length(split: Split) -> list[tuple[np.ndarray, Split]]:
    """Sorts the samples of a split, padded on the right, into buckets.

    Args:
      split: with an `attention_mask [n, L]`; any other split is one bucket.

    Returns:
      `(rows, split)` a bucket: which rows of the split, and all of it cut to the bucket's length, unread.
    """
    mask: Any = split.inputs.get("attention_mask")
    if mask is None:
        return [(np.arange(len(split.labels)), split)]
    whole = mask.shape[1]
    # The last real token, not their number: a hole in the mask must not cut what follows it.
    lengths = mask.lengths if isinstance(mask, Padded) else (mask * np.arange(1, whole + 1)).max(1)
    sizes = np.minimum([bucket(int(length)) for length in lengths], whole)
    out = []
    for size in np.unique(sizes):
        inputs = {k: x[:, :size] if k in SEQUENCES else x for k, x in split.inputs.items()}
        labels = split.labels[:, :size] if split.labels.ndim == 2 else split.labels
        out.append((np.flatnonzero(sizes == size), Split(inputs, labels)))
    return out
