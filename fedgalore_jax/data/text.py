"""Classification and regression of texts: tables to splits."""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fedgalore_jax.data import tables, tokens
from fedgalore_jax.data.dataset import Asked, Dataset, Source, Split, bins
from fedgalore_jax.data.padded import Rows
from fedgalore_jax.data.tables import Table

MAX_LENGTH = 128
"""Tokens at most where `max_length` is not given."""


class Columns(NamedTuple):
    """Where the samples of a table are.

    Attributes:
      texts: one column, or two for pairs of sentences.
      label: the column of labels.
      names: of the classes where the labels are their indices; None to take the classes from the data;
        empty for regression.
      domain: the column of the natural key, or None.
    """

    texts: tuple[str, ...]
    label: str
    names: tuple[str, ...] | None = None
    domain: str | None = None


def load(source: Source) -> Dataset:
    """A user's table, `--task=text`: `--data`, `--text_column`, `--label_column`, `--client_column`.

    Raises:
      ValueError, OSError: see `classification`, and `tables.splits`.
    """
    texts = _columns(source)
    if source.data is None:
        raise ValueError("data is missing: give a csv, jsonl or parquet file, or a folder with train.csv")
    found = tables.splits(source.data)
    where = Columns(texts, source.label_column, None, source.client_column)
    for name, table in found.items():
        tables.columns(table, [*where.texts, where.label], name)
    keep = (where.label, *([where.domain] if where.domain else []))
    tables.columns(found["train"], keep, "train")
    return classification(tables.three(found, source.seed, keep), where, source)


def read(source: Source, file: str) -> Asked:
    """Texts to be classified: the `text_column` of a table."""
    texts = tables.columns(tables.read(pathlib.Path(file)), _columns(source), file)
    inputs, notes = _inputs(source, texts, file, *tokens.special(source.model))
    n = len(texts[0])
    return Asked(range(1, n + 1), Split(inputs, np.zeros(n, np.int32)), tuple(notes))


def _inputs(
    source: Source, columns: Sequence[Sequence[Any]], where: str, pad: int, with_types: bool
) -> tuple[dict[str, Rows], list[str]]:
    """Model inputs of one column of texts or of two, and what was cut of them."""
    positions = tokens.positions(source.model)
    limit = min(source.max_length or MAX_LENGTH, positions)
    texts, *pairs = [[str(value) for value in column] for column in columns]
    encoded = tokens.encode(source.model, texts, pairs[0] if pairs else None, limit, source.cache)
    notes = []
    if encoded.cut:
        remedy = ": raise --max_length to read more" if limit < positions else ""
        notes.append(f"{encoded.cut} of {len(texts)} texts of {where} were cut to {limit} tokens{remedy}")
    return tokens.batch(encoded, pad, with_types, positions), notes


def _columns(source: Source) -> tuple[str, ...]:
    names = tuple(name.strip() for name in source.text_column.split(","))
    if len(names) > 2:
        raise ValueError(f"text_column={source.text_column!r}: give one column, or two for pairs")
    return names


def classification(found: dict[str, Table], where: Columns, source: Source) -> Dataset:
    """Tokenises three tables, and any others as more tests.

    Args:
      found: `train`, `validation`, `test`, and others.
      where: their columns.
      source: the model, its limits, the cache.

    Returns:
      A `Dataset`; `classes` are the labels, or quantile bins of regression targets.

    Raises:
      ValueError: a missing column, a label that training lacks, a client without a training sample.
      OSError, ImportError: no tokenizer.
    """
    labels = {name: tables.columns(table, [where.label], name)[0] for name, table in found.items()}
    names = class_names(labels["train"], where.names)
    encoded_labels = {
        name: numbers(values, names, name, by_index=where.names is not None)
        for name, values in labels.items()
    }
    notes: list[str] = []
    parts: dict[str, Split] = {}
    special = tokens.special(source.model)
    for name, table in found.items():
        # A user's texts were looked at in `load`; of QQP's questions two are empty, and stay.
        columns = tables.columns(table, where.texts, name, blank=True)
        inputs, cut = _inputs(source, columns, name, *special)
        notes += cut
        parts[name] = Split(inputs, encoded_labels[name])
    domains, domain_names = natural_key(found, where.domain)
    classes = encoded_labels["train"]
    return Dataset(
        parts.pop("train"),
        parts.pop("validation"),
        parts.pop("test"),
        max(1, len(names)),
        classes if names else bins(classes),
        names,
        domains,
        domain_names,
        parts,
        notes=tuple(notes),
    )


def class_names(train: Sequence[Any], given: tuple[str, ...] | None) -> tuple[str, ...]:
    """Names of the classes in order: as given, else the training labels sorted (numbers as numbers)."""
    if given is not None:
        return given
    found = {str(value).strip() for value in train}
    if len(found) < 2:
        raise ValueError(f"all training labels are {found.pop()!r}: a classifier needs two classes at least")
    in_order = sorted(found)
    try:
        return tuple(sorted(in_order, key=float))  # of equal ones, such as 1 and 01, as before
    except ValueError:
        return tuple(in_order)


def numbers(values: Sequence[Any], names: tuple[str, ...], where: str, *, by_index: bool) -> np.ndarray:
    """Labels as class indices int32, or as float32 where there are no classes.

    A label is a class's name, white space at its ends aside, or, if `by_index`, its index too.
    """
    if not names:
        return np.array([_number(value, where, i) for i, value in enumerate(values, 1)], np.float32)
    index = {str(i): i for i in range(len(names))} if by_index else {}
    index |= {name.strip(): i for i, name in enumerate(names)}
    strings = [str(value).strip() for value in values]
    if unknown := sorted(set(strings) - set(index)):
        raise ValueError(
            f"label {unknown[0]!r} of the {where} split is unknown: the classes are {', '.join(names)}"
        )
    return np.array([index[value] for value in strings], np.int32)


def _number(value: Any, where: str, sample: int) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(
            f"label {value!r} of sample {sample} of the {where} split is no number: correct it, or drop it"
        ) from None


def natural_key(found: dict[str, Table], column: str | None) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """The key of every training sample `[n]`, and the keys' names.

    Raises:
      ValueError: a key that other splits have and training lacks: a client with no sample.
    """
    if column is None:
        return None, ()
    keys = {
        name: [str(k).strip() for k in tables.columns(t, [column], name)[0]]
        for name, t in found.items()
        if column in t
    }
    names = tuple(sorted(set(keys["train"])))
    for name, values in keys.items():
        if lonely := sorted(set(values) - set(names)):
            raise ValueError(
                f"client {lonely[0]!r} of the {name} split has no training sample: give it one, or drop it"
            )
    index = {name: i for i, name in enumerate(names)}
    return np.array([index[key] for key in keys["train"]], np.int32), names
