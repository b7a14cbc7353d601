"""A run's folder on disk: claimed by one process at a time, every file and every line in it whole."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

CONFIG, METRICS, SUMMARY = "config.json", "metrics.jsonl", "summary.json"
LOCK = ".lock"
BEFORE = {LOCK, "config.partial"}
"""All that there is before `config.json`: a run that was killed there has not begun."""


def is_new(path: pathlib.Path) -> bool:
    """Whether a folder holds no run and nothing else."""
    return not path.exists() or (path.is_dir() and all(entry.name in BEFORE for entry in path.iterdir()))


def refuse_used(path: pathlib.Path, *, resume: bool = False) -> None:
    """Raises an OSError where a run may not be written.

    Args:
      path: a folder that holds something else, that another process writes to, or that cannot be made.
      resume: whether a run that is there already may go on.
    """
    if not is_new(path):
        if not resume:
            raise FileExistsError(f"out_dir={str(path)!r} is in use: choose a new folder, or give --resume")
        if not (path / CONFIG).exists():
            raise FileExistsError(f"out_dir={str(path)!r} holds no run to go on with: choose a new folder")
        with locked(path):
            pass
    parent = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise PermissionError(f"out_dir={str(path)!r} cannot be written: choose another folder")


@contextlib.contextmanager
def claim(path: pathlib.Path, *, resume: bool = False) -> Iterator[pathlib.Path]:
    """Makes the folder and holds it while a run writes; whoever comes second is refused.

    Args:
      path: the folder.
      resume: whether it may hold something already.

    Raises:
      OSError: it is in use, or another process holds it.
    """
    path.mkdir(parents=True, exist_ok=True)
    with locked(path):
        if not resume and not is_new(path):  # also what another run left here since it was looked at
            refuse_used(path)
        yield path


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """Holds a lock on an existing folder. It is the operating system's: it dies with its process."""
    with open(path / LOCK, "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"out_dir={str(path)!r} is in use: another run writes there now"
            raise FileExistsError(message) from None
        yield


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_json(path: pathlib.Path) -> Any:
    """Reads a file that `write_json` wrote."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error})") from None


def append_line(path: pathlib.Path, record: dict[str, Any]) -> None:
    """Appends one line of JSON, whole or not at all."""
    line = (json.dumps(record) + "\n").encode()
    with open(path, "ab", buffering=0) as file:
        size = file.tell()
        if (written := file.write(line)) < len(line):  # the disk is full
            file.truncate(size)
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({written} bytes of a line)", str(path))


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The whole lines that `append_line` left, up to the first that is not."""
    records = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        try:
            records.append(json.loads(line if line.endswith(b"\n") else b""))
        except ValueError:
            break
    return records


def write_lines(path: pathlib.Path, records: list[dict[str, Any]]) -> None:
    """Writes all lines of a file anew, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    os.replace(partial, path)


def remove_leftovers(path: pathlib.Path) -> None:
    """Removes the temporary folders that a killed process left of models it was saving."""
    for leftover in (*path.glob(".*.*/"), *path.glob("models/.*.*/")):
        shutil.rmtree(leftover)
