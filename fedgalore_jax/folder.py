"""A run's folder on disk: claimed once, every file and every line in it whole."""

import json
import os
import pathlib
from typing import Any


def refuse_used(path: pathlib.Path) -> None:
    """Raises an OSError where a run may not be written: a folder that holds anything, or cannot be made."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"out_dir={str(path)!r} is in use: choose a new folder")
    parent = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise PermissionError(f"out_dir={str(path)!r} cannot be written: choose another folder")


def claim(path: pathlib.Path) -> pathlib.Path:
    """Makes the folder; whoever comes second is refused."""
    refuse_used(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def append_line(path: pathlib.Path, record: dict[str, Any]) -> None:
    """Appends one line of JSON."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
