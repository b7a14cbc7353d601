"""Tables of a user or a hub as plain columns: csv, tsv, json, jsonl, parquet, folders, `datasets`."""

import csv
import json
import pathlib
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from fedgalore_jax.data.dataset import split_rows

Table = dict[str, list[Any]]
SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
_SHARD = r"-\d+-of-\d+$"
_NAMES = {"valid": "validation", "val": "validation", "dev": "validation"}


def read(path: pathlib.Path) -> Table:
    """Reads one file.

    Returns:
      Its columns, all of one length; csv's values are strings.

    Raises:
      FileNotFoundError, ValueError: no such file, an empty one, another format, a broken line.
    """
    if not path.exists():
        raise FileNotFoundError(f"data={str(path)!r} does not exist")
    reader = {".csv": _csv, ".tsv": _csv, ".json": _json, ".jsonl": _jsonl, ".parquet": _parquet}
    if path.suffix not in reader:
        raise ValueError(f"data={str(path)!r}: give a file that ends in {', '.join(SUFFIXES)}")
    try:
        table = reader[path.suffix](path)
    except csv.Error as error:
        raise ValueError(f"data={str(path)!r} is no sound csv ({error}): look at its quotes") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"data={str(path)!r} is not UTF-8 text: {error}") from None
    if not table or not len(next(iter(table.values()))):
        raise ValueError(f"data={str(path)!r} is empty: give a file with at least one sample")
    return table


def _csv(path: pathlib.Path) -> Table:
    csv.field_size_limit(2**31 - 1)
    with open(path, encoding="utf-8-sig", newline="") as file:
        # In a tsv a quote is a letter; in a csv one that is not closed would swallow the lines after it.
        form: dict[str, Any] = {"strict": True, "skipinitialspace": True}
        if path.suffix == ".tsv":
            form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        rows = csv.reader(file, **form)
        header = next(rows, [])
        if twice := {name for name in header if header.count(name) > 1}:
            raise ValueError(f"data={str(path)!r} has more than one column {sorted(twice)[0]!r}")
        table: Table = {name: [] for name in header}
        for row in rows:
            if not row:
                continue
            if len(row) != len(header):
                fields = f"{len(row)} fields, the header has {len(header)}"
                raise ValueError(f"data={str(path)!r}, line {rows.line_num}: {fields}")
            for name, value in zip(header, row, strict=True):
                table[name].append(value)
    return table


def _jsonl(path: pathlib.Path) -> Table:
    records = []
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    records.append(json.loads(line))
                except json.JSONDecodeError as error:
                    message = f"data={str(path)!r}, line {number} is not JSON ({error.msg})"
                    raise ValueError(message) from None
    return _records(records, path)


def _json(path: pathlib.Path) -> Table:
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig") or "[]")
    except json.JSONDecodeError as error:
        raise ValueError(
            f"data={str(path)!r} is not JSON ({error}): for a line a record, name it .jsonl"
        ) from None
    return _records(records, path)


def _records(records: Any, path: pathlib.Path) -> Table:
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError(f'data={str(path)!r} must hold objects such as {{"text": ..., "label": ...}}')
    names = list(dict.fromkeys(name for record in records for name in record))
    return {name: [record.get(name) for record in records] for name in names}


def _parquet(path: pathlib.Path) -> Table:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise ImportError("parquet files are read by pyarrow: pip install pyarrow") from error
    try:
        return parquet.read_table(path).to_pydict()
    except ArrowInvalid as error:
        raise ValueError(f"data={str(path)!r} is not a parquet file ({error})") from None


def splits(data: str) -> dict[str, Table]:
    """Reads a file, or a folder whose files are named after splits.

    Args:
      data: the file, which is all of `train`; or a folder with `train.csv`, `validation.csv`, `test.csv` in
        any of the formats. `dev`, `val` and `valid` mean validation; shards such as
        `train-00000-of-00002.parquet` are joined; further names (`validation_matched`) are kept.

    Returns:
      Tables by split, `train` among them.

    Raises:
      FileNotFoundError, ValueError: no `train`, two files of one split, shards that do not match, or what
        `read` raises.
    """
    path = pathlib.Path(data)
    if not path.is_dir():
        return {"train": read(path)}
    files: dict[str, list[pathlib.Path]] = {}
    for file in sorted(file for file in path.iterdir() if file.suffix in SUFFIXES):
        stem = re.sub(_SHARD, "", file.stem)
        files.setdefault(_NAMES.get(stem, stem), []).append(file)
    found: dict[str, Table] = {}
    for name, parts in files.items():
        stems = [file.stem for file in parts]
        if len(set(stems)) < len(stems) or len({re.sub(r"-\d+-of-", "-of-", stem) for stem in stems}) > 1:
            names = " and ".join(file.name for file in parts[:2])
            raise ValueError(f"data={data!r} has {names}: both are {name!r}, keep one")
        read_parts = [read(file) for file in parts]
        if any(part.keys() != read_parts[0].keys() for part in read_parts):
            raise ValueError(f"data={data!r}: the files of {name!r} have different columns")
        found[name] = {column: [v for part in read_parts for v in part[column]] for column in read_parts[0]}
    if "train" not in found:
        there = ", ".join(sorted(file.name for file in path.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(f"data={data!r} has no train.csv, .jsonl or .parquet: there is {there}")
    return found


def hub(name: str, config: str | None = None, *, raw_images: str | None = None) -> dict[str, Table]:
    """Loads a data set by its hub name through `datasets`.

    Args:
      name: such as "nyu-mll/glue".
      config: such as "cola".
      raw_images: a column of images that stay encoded bytes.

    Returns:
      Tables by split.

    Raises:
      ImportError: `datasets` is not installed.
      OSError: it could not be fetched.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{name} comes through datasets: pip install datasets") from error
    try:
        loaded: Any = datasets.load_dataset(name, config)
    except Exception as error:  # whatever the hub's client raises, the remedy is the same
        raise OSError(
            f"{name} could not be fetched ({type(error).__name__}: {str(error)[:200]}):"
            " connect to the hub, or give --data=FOLDER with its files"
        ) from error
    if raw_images:
        loaded = loaded.cast_column(raw_images, datasets.Image(decode=False))
    return {split: {k: list(part[k]) for k in part.column_names} for split, part in loaded.items()}


def columns(
    table: Table, names: Iterable[str], where: str, *, blank: bool = False, nested: bool = False
) -> list[list[Any]]:
    """Columns by name.

    Args:
      table: has them.
      names: of the columns.
      where: what a message calls the table.
      blank: whether texts of nothing but white space may stand.
      nested: whether a cell may hold several values, in place of one text or number.

    Raises:
      ValueError: a missing column (the message lists those there are), a cell that is empty or holds several
        values (it names the sample).
    """

    def empty(value: Any) -> bool:
        missing = value is None or value != value  # NaN stands for what is missing in parquet
        return missing or (not blank and isinstance(value, str) and not value.strip())

    found = []
    for name in names:
        if name not in table:
            there = ", ".join(map(repr, table))
            raise ValueError(f"column {name!r} is missing in {where}: its columns are {there}")
        for i, value in enumerate(table[name], 1):
            if empty(value):
                raise ValueError(f"column {name!r} of {where} is empty in sample {i}: fill it, or drop it")
            if not nested and isinstance(value, list | dict):
                kind = f"a {type(value).__name__}"
                raise ValueError(
                    f"column {name!r} of {where} holds {kind} in sample {i}: give one text or number a cell"
                )
        found.append(table[name])
    return found


def take(table: Table, rows: np.ndarray) -> Table:
    """Some rows of a table."""
    return {name: [column[i] for i in rows] for name, column in table.items()}


def three(tables: dict[str, Table], seed: int, keep: tuple[str, ...] = ()) -> dict[str, Table]:
    """Completes train, validation and test: a seeded tenth of train for each that is missing.

    Args:
      tables: with `train`.
      seed: decides the split.
      keep: columns of which every value stays in training.
    """
    train = tables["train"]
    missing = [name for name in ("validation", "test") if name not in tables]
    if not missing:
        return tables
    keys = [np.array([str(value) for value in train[name]]) for name in keep]
    parts = split_rows(len(next(iter(train.values()))), [0.1] * len(missing), seed, keys)
    dealt = dict(zip(["train", *missing], (take(train, rows) for rows in parts), strict=True))
    return tables | dealt
