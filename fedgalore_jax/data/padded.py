"""Rows of tokens that are padded when they are asked for."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Padded:
    """Behaves as an array `[n, width]` int32 that is read by the row; `x[:, :size]` is the same, narrower.

    A row is `tokens[start : start + length]`, padded on the right. The tokens may be a map of a file, of
    which then only the rows asked for are read.

    >>> np.asarray(Padded(np.arange(5), np.array([0, 2]), np.array([2, 3]), width=4, fill=-1))
    array([[ 0,  1, -1, -1],
           [ 2,  3,  4, -1]], dtype=int32)

    Attributes:
      tokens: of all rows, end to end.
      starts, lengths: `[n]`, of each row.
      width: of all rows.
      fill: what pads.
      hidden: so many tokens at the beginning of each row are `fill` as well, `[n]` or one for all.
    """

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    width: int
    fill: int
    hidden: Any = 0

    dtype = np.dtype(np.int32)

    @property
    def shape(self) -> tuple[int, int]:
        """`(n, width)`."""
        return len(self.starts), self.width

    @property
    def ndim(self) -> int:
        """2."""
        return 2

    @property
    def nbytes(self) -> int:
        """Of the array that this behaves as."""
        return len(self.starts) * self.width * self.dtype.itemsize

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, where: Any) -> Any:
        if isinstance(where, tuple):
            rows, places = where
            if isinstance(places, slice) and places.start is places.step is None:
                narrower = dataclasses.replace(self, width=places.indices(self.width)[1])
                return narrower if isinstance(rows, slice) and rows == slice(None) else narrower[rows]
            return self[rows][..., places]
        places = np.arange(self.width)
        hidden = np.broadcast_to(self.hidden, self.starts.shape)
        starts, ends, hidden = (x[where][..., None] for x in (self.starts, self.lengths, hidden))
        real = (places >= hidden) & (places < ends)
        return np.where(real, self.tokens[np.where(real, starts + places, 0)], self.fill).astype(self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:] if dtype is None else self[:].astype(dtype)


Rows = np.ndarray | Padded
"""What is read by rows."""
