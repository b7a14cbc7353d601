"""Arrays that are made once and kept on disk: mapped, so that memory holds what is looked at."""

import fcntl
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
Empty = Callable[[str, tuple[int, ...], Any], np.ndarray]
"""Makes an array to be filled, given its name, shape and type: in a file where arrays are kept in files."""
NAMES = "names.json"
"""Written last of all: what a folder without it holds does not count."""


def default_cache() -> pathlib.Path:
    """The user's cache folder of this library; `XDG_CACHE_HOME` is respected."""
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(root) / "fedgalore_jax"


def cached(folder: pathlib.Path | None, key: Iterable[Any], compute: Callable[[Empty], Arrays]) -> Arrays:
    """Arrays that were computed once for a key.

    They are there whole or not at all; what cannot be read is computed and written again. Of several
    processes that share the folder one computes, and the others wait for it. A folder that cannot be written,
    or a full disk, costs time and memory, not the run.

    Args:
      folder: of all that is kept, or None to keep nothing.
      key: anything JSON can write; of lists among it, each element.
      compute: makes the arrays by name. Large ones it asks `Empty` for.

    Returns:
      The arrays; those that are kept are read-only maps of their files, read by the page.
    """
    if folder is None:
        return compute(_in_memory)
    path = folder / _digest(key)
    if found := _read(path):
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = _read(path)
            if not found:
                _write(path, compute)
                found = _read(path)
    except OSError:
        found = {}
    return found or compute(_in_memory)


def _digest(key: Iterable[Any]) -> str:
    """Of a key that may hold all texts of a data set, without a copy of them."""
    digest = hashlib.sha256()
    for part in key:
        many = isinstance(part, list)
        digest.update(b"[\n" if many else b"\n")
        for element in part if many else [part]:
            digest.update(json.dumps(element).encode() + b"\n")
    return digest.hexdigest()[:32]


def _in_memory(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    del name
    return np.empty(shape, dtype)


def _read(path: pathlib.Path) -> Arrays:
    try:
        names = json.loads((path / NAMES).read_text())
        return {name: np.load(path / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names}
    except Exception:  # damage shows in many ways, a header's in those of a Python parser
        return {}


def _write(path: pathlib.Path, compute: Callable[[Empty], Arrays]) -> None:
    """Fills a folder beside its place, and puts it there."""
    new = path.with_suffix(".partial")
    shutil.rmtree(new, ignore_errors=True)  # a killed process left it
    new.mkdir()

    def in_file(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        file = new / f"{name}.npy"
        array = np.lib.format.open_memmap(file, "w+", dtype, shape)
        if hasattr(os, "posix_fallocate"):  # on a full disk an error here, in place of a dead process later
            with open(file, "r+b") as opened:
                os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
        return array

    try:
        arrays = compute(in_file)
        for name, array in arrays.items():
            if isinstance(array, np.memmap):
                array.flush()
            else:
                np.save(new / f"{name}.npy", array)
        (new / NAMES).write_text(json.dumps(list(arrays)))
        for file in new.iterdir():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
        shutil.rmtree(path, ignore_errors=True)
        new.rename(path)
    finally:
        shutil.rmtree(new, ignore_errors=True)
