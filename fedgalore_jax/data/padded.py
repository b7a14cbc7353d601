"""Rows of tokens that are padded when they are asked for."""

import dataclasses
from typing import Any

import numpy as np

AT_A_TIME = 4096
"""Rows that are padded together."""


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
    def size(self) -> int:
        """Elements of the array that this behaves as."""
        return len(self.starts) * self.width

    def take(self, rows: np.ndarray, axis: int = 0) -> "Padded":
        """These rows, as unread as all of them."""
        starts, lengths, hidden = (x.take(rows, axis) for x in (self.starts, self.lengths, self._hidden))
        return dataclasses.replace(self, starts=starts, lengths=lengths, hidden=hidden)

    @property
    def _hidden(self) -> np.ndarray:
        return np.broadcast_to(self.hidden, self.starts.shape)

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
        starts, ends, hidden = (x[where][..., None] for x in (self.starts, self.lengths, self._hidden))
        real = (places >= hidden) & (places < ends)
        out = np.full(real.shape, self.fill, self.dtype)
        out[real] = self.tokens[(starts + places)[real]]
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        out = np.empty(self.shape, dtype or self.dtype)
        for first in range(0, len(self), AT_A_TIME):  # no second array of that size on the way
            rows = slice(first, first + AT_A_TIME)
            out[rows] = self[rows]
        return out


Rows = np.ndarray | Padded
"""What is read by rows."""
