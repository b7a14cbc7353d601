"""Reading safetensors files, single or sharded, without holding any of it twice."""

import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": jnp.float64, "F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}
CHUNK = 1 << 22
"""Elements copied at a time."""


class Tensor(NamedTuple):
    """A tensor in a file, not read yet; `dtype` is safetensors' name, such as BF16."""

    file: pathlib.Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read_into(self, out: np.ndarray) -> None:
        """Copies it to `out`, which has its shape and any strides and dtype."""
        for where, piece in self._pieces():
            out[where] = piece

    def equals(self, other: "Tensor") -> bool:
        """Whether both hold the same numbers."""
        pairs = zip(self._pieces(), other._pieces(), strict=True)
        return self.shape == other.shape and all((a == b).all() for (_, a), (_, b) in pairs)

    def _pieces(self) -> Iterator[tuple[Any, np.ndarray]]:
        """Parts of it, and where in it they are.

        The file is mapped for that time only: pages of a mapping count as the process's memory for as
        long as it lives.
        """
        with _open(self.file) as file:
            tensor = file.get_slice(self.name)
            if not self.shape:
                yield ..., file.get_tensor(self.name)
                return
            total, rows = self.shape[0], max(1, CHUNK // max(1, math.prod(self.shape[1:])))
            for start in range(0, total, rows):
                where = slice(start, min(start + rows, total))
                yield where, tensor[where]


def find(path: pathlib.Path) -> tuple[pathlib.Path, dict[str, Tensor]]:
    """All tensors of a model directory by name, and the file that names them.

    Args:
      path: a directory with `model.safetensors`, or the shards of a `model.safetensors.index.json`.

    Raises:
      ValueError: one line that names the file, what is wrong with it, and the remedy.
    """
    index = path / INDEX
    if (path / WEIGHTS).exists() or not index.exists():
        return path / WEIGHTS, _headers(path / WEIGHTS)
    try:
        shards = json.loads(index.read_text())["weight_map"]
        files = sorted(set(shards.values()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged ({error!r}): copy it again") from error
    found = {name: tensor for file in files for name, tensor in _headers(path / file).items()}
    if lost := sorted(shards.keys() - found.keys()):
        raise ValueError(f"{index} names {', '.join(lost)}, which no shard holds: copy the shards again")
    return index, found


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array that JAX's CPU backend takes over as it is: it copies one that starts off a cache line."""
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def _headers(file: pathlib.Path) -> dict[str, Tensor]:
    if not file.exists():
        raise ValueError(f"{file} does not exist: save the model as safetensors")
    with _open(file) as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118, not a dict
        return {name: Tensor(file, name, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}


def _open(file: pathlib.Path) -> Any:
    try:
        return safetensors.safe_open(file, "numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged ({error}): copy it again") from error
