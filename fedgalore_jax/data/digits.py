"""UCI handwritten digits, as scikit-learn ships them: 1797 images of 8 x 8 pixels."""

import numpy as np

from fedgalore_jax.data.dataset import Dataset, Split


def load() -> Dataset:
    """Loads the digits in a fixed split: 1200 training, 200 validation and 397 test images.

    Returns:
      A `Dataset` with `pixel_values [n, 8, 8, 1]` in [-1, 1] (pixels p in [0, 1] become (p - 0.5) / 0.5).
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install scikit-learn") from error
    images, labels = map(np.asarray, load_digits(return_X_y=True))
    pixels = (images.reshape(-1, 8, 8, 1) / 16).astype(np.float32) * 2 - 1
    order = np.random.default_rng(0).permutation(len(labels))
    train, validation, test = (
        Split({"pixel_values": pixels[rows]}, labels[rows].astype(np.int32))
        for rows in np.split(order, [1200, 1400])
    )
    return Dataset(train, validation, test, num_labels=10)
