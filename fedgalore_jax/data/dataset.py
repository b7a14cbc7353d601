"""A data set, and what a loader is told."""

import hashlib
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fedgalore_jax.data.padded import Rows

IGNORE = -100
"""A label of `[n, L]` labels where no loss is taken, as Hugging Face's and PyTorch's losses have it."""
DIGESTED = 1024
"""Samples of each split that a digest reads: a fraction of a second, however large the data are."""
JUDGES = 0
"""The seed of the samples that judge where not all do: runs of all seeds are judged by the same ones."""


class Source(NamedTuple):
    """What a loader may need to know; each reads what concerns it.

    Attributes:
      model: the model's directory in Hugging Face's layout: tokenizer, positions, image size, mean and std.
      data: the user's file or folder, or None for the task's own data.
      text_column: of a user's table; two, comma-separated, for pairs of sentences or prompt and answer.
      label_column: of a user's table.
      client_column: of a user's table, the natural key of a partition; None for none.
      max_length: tokens at most; the task's default if None. The model's positions bound it anyway.
      seed: of every split that the data do not come with.
      cache: folder of tokenised texts and decoded images, or None to keep nothing.
    """

    model: pathlib.Path
    data: str | None = None
    text_column: str = "text"
    label_column: str = "label"
    client_column: str | None = None
    max_length: int | None = None
    seed: int = 0
    cache: pathlib.Path | None = None


class Split(NamedTuple):
    """Samples.

    Attributes:
      inputs: model inputs by their Hugging Face names, each `[n, ...]`. What loaders kept on disk is read by
        the row, when it is asked for.
      labels: `[n]` integer classes, `[n]` float32 targets, or `[n, L]` token ids with `IGNORE`.
    """

    inputs: dict[str, Rows]
    labels: Rows

    @property
    def arrays(self) -> dict[str, Rows]:
        """Inputs and labels in one dict."""
        return self.inputs | {"labels": self.labels}

    def take(self, rows: np.ndarray) -> "Split":
        """The samples of those rows."""
        return Split({name: x.take(rows, 0) for name, x in self.inputs.items()}, self.labels.take(rows, 0))


class Generation(NamedTuple):
    """The test split as questions to be answered by generating.

    Attributes:
      inputs: `input_ids` and `attention_mask` of the prompts, `[n, L]`, padded on the left.
      references: the n right answers.
      decode: `tokens [n, T] -> n texts`; what follows the first end token is dropped.
      score: `(texts, references) -> {metric: value}`.
      eos: tokens that end an answer.
      pad: the padding token.
      max_new_tokens: T at most.
    """

    inputs: dict[str, np.ndarray]
    references: list[str]
    decode: Callable[[np.ndarray], list[str]]
    score: Callable[[Sequence[str], Sequence[str]], dict[str, float]]
    eos: tuple[int, ...]
    pad: int
    max_new_tokens: int

    def take(self, rows: np.ndarray) -> "Generation":
        """The prompts of those rows."""
        inputs = {name: x[rows] for name, x in self.inputs.items()}
        return self._replace(inputs=inputs, references=[self.references[i] for i in rows])


class Asked(NamedTuple):
    """Samples without labels, to be answered.

    Attributes:
      names: of the n samples: row numbers from 1 on, or files.
      samples: inputs with labels of 0, or prompts.
      notes: what was cut, a line each, to be shown.
    """

    names: Sequence[int | str]
    samples: Split | Generation
    notes: tuple[str, ...] = ()


class Dataset(NamedTuple):
    """Three splits: tuning and model selection look at `validation`, never at `test`.

    Attributes:
      train, validation, test: the splits.
      num_labels: outputs of the model's head; 0 where it has none.
      classes: `[n_train]` integers that a label-skewed partition deals by.
      label_names: of the classes, in order; empty where `classes` are only bins.
      domains: `[n_train]` natural key of each training sample (a domain, the user's client), or None.
      domain_names: in the order of `domains`.
      more_tests: further test splits by name, such as one per domain.
      generation: the test split to be answered by generating, or None.
      notes: what was left out or cut on the way, a line each, to be shown.
    """

    train: Split
    validation: Split
    test: Split
    num_labels: int
    classes: np.ndarray
    label_names: tuple[str, ...] = ()
    domains: np.ndarray | None = None
    domain_names: tuple[str, ...] = ()
    more_tests: dict[str, Split] = {}  # noqa: RUF012 - never written to
    generation: Generation | None = None
    notes: tuple[str, ...] = ()

    def digest(self, parts: Sequence[np.ndarray]) -> str:
        """A hash that tells other data, or others' shares of them, from these.

        It reads some rows of every split, all classes, and who has what.

        Args:
          parts: which training samples each client has.
        """
        found = hashlib.sha256()
        splits = {"train": self.train, "validation": self.validation, "test": self.test} | self.more_tests
        for name, split in splits.items():
            n = len(split.labels)
            rows = np.unique(np.linspace(0, n - 1, min(n, DIGESTED), dtype=int))
            for key, values in sorted(split.take(rows).arrays.items()):
                found.update(f"{name} {key} {n}".encode() + np.asarray(values).tobytes())
        found.update(repr(self.label_names).encode() + np.asarray(self.classes).tobytes())
        for part in parts:
            found.update(f"{len(part)}".encode() + np.asarray(part, np.int64).tobytes())
        return found.hexdigest()[:16]

    def judged_by(self, n: int) -> "Dataset":
        """The same with at most n samples in every split that is evaluated.

        They are drawn at random, because files are often sorted by class or domain, but always the same ones
        of a split of that size, whatever the run's seed; their order stays.
        """

        def rows(size: int) -> np.ndarray:
            return np.sort(np.random.default_rng(JUDGES).choice(size, min(n, size), replace=False))

        return self._replace(
            validation=self.validation.take(rows(len(self.validation.labels))),
            test=self.test.take(rows(len(self.test.labels))),
            more_tests={name: s.take(rows(len(s.labels))) for name, s in self.more_tests.items()},
            generation=self.generation and self.generation.take(rows(len(self.generation.references))),
        )


def split_rows(
    n: int, shares: Sequence[float], seed: int, keep: Sequence[np.ndarray] = ()
) -> list[np.ndarray]:
    """Deals n rows into consecutive shares of a shuffle.

    Args:
      n: rows.
      shares: of the parts after the first, which gets the rest; every part gets one row at least.
      seed: decides the shuffle.
      keep: keys `[n]` of rows; each key's first row of the shuffle goes to the first part, so that no
        label and no client is missing from training.

    Returns:
      One sorted array of rows a part.

    Raises:
      ValueError: fewer rows than parts.

    >>> [part.size for part in split_rows(20, [0.1, 0.1], seed=0)]
    [16, 2, 2]
    """
    counts = [max(1, round(share * n)) for share in shares]
    if n <= len(shares):
        raise ValueError(f"{n} samples cannot make {len(shares) + 1} splits: give more data")
    order = np.random.default_rng(seed).permutation(n)
    held = np.zeros(n, bool)
    for keys in keep:
        held[np.unique(np.asarray(keys)[order], return_index=True)[1]] = True
    order = np.concatenate([order[held], order[~held]])
    counts = [min(counts[i], max(1, (n - 1) // len(counts))) for i in range(len(counts))]
    return [np.sort(part) for part in np.split(order, np.cumsum([n - sum(counts), *counts])[:-1])]


def bins(values: np.ndarray, count: int = 10) -> np.ndarray:
    """Quantile bins `[n]` of regression targets, which a label-skewed partition deals by."""
    edges = np.unique(np.quantile(values, np.arange(1, count) / count))
    return np.searchsorted(edges, values, side="right").astype(np.int32)
