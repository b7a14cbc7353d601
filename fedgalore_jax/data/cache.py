"""Arrays that are made once and kept on disk: mapped, so that memory holds what is looked at."""

import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
Empty = Callable[[str, tuple[int, ...], Any], np.ndarray]
"""Makes an array to be filled, given its name, shape and type: in a file where arrays are kept in files."""


def default_cache() -> pathlib.Path:
    """The user's cache folder of this library; `XDG_CACHE_HOME` is respected."""
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(root) / "fedgalore_jax"


def cached(folder: pathlib.Path | None, key: Any, compute: Callable[[Empty], Arrays]) -> Arrays:
    """Arrays that were computed once for a key.

    They are there whole or not at all; what cannot be read is computed and written again; a folder that
    cannot be written, or a full disk, costs time and memory, not the run.

    Args:
      folder: of all that is kept, or None to keep nothing.
      key: anything JSON can write.
      compute: makes the arrays by name. Large ones it asks `Empty` for.

    Returns:
      The arrays; those that are kept are read-only maps of their files, read by the page.
    """
    if folder is None:
        return compute(_in_memory)
    path = folder / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    try:
        return _read(path)
    except (OSError, ValueError, EOFError):
        pass
    new = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        new = pathlib.Path(tempfile.mkdtemp(dir=folder, suffix=".partial"))
        _write(new, compute)
        _publish(new, path)
        return _read(path)
    except OSError:
        return compute(_in_memory)
    finally:
        if new is not None:
            shutil.rmtree(new, ignore_errors=True)


def _in_memory(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    del name
    return np.empty(shape, dtype)


def _read(path: pathlib.Path) -> Arrays:
    arrays = {file.stem: np.load(file, mmap_mode="r", allow_pickle=False) for file in path.glob("*.npy")}
    if not arrays:
        raise FileNotFoundError(path)
    return arrays


def _write(folder: pathlib.Path, compute: Callable[[Empty], Arrays]) -> None:
    def in_file(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        file = folder / f"{name}.npy"
        array = np.lib.format.open_memmap(file, "w+", dtype, shape)
        if hasattr(os, "posix_fallocate"):  # on a full disk an error here, in place of a dead process later
            with open(file, "r+b") as opened:
                os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
        return array

    for name, array in compute(in_file).items():
        if not isinstance(array, np.memmap):
            np.save(folder / f"{name}.npy", array)


def _publish(new: pathlib.Path, path: pathlib.Path) -> None:
    """Puts a finished folder in place, unless another process was faster."""
    try:
        new.rename(path)
    except OSError:
        try:
            _read(path)
        except (OSError, ValueError, EOFError):
            shutil.rmtree(path, ignore_errors=True)
            new.rename(path)
