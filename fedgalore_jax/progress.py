"""One live line in a terminal, plain lines where there is none."""

import shutil
import sys
import time
from typing import TextIO


class Progress:
    """Shows where a run is.

    In a terminal the line is rewritten in place; in a file or a pipe every tenth of the run is a line.

    Args:
      total: rounds in all.
      first: rounds that were done before.
      stream: where to write; stderr if None.
    """

    def __init__(self, total: int, first: int = 0, stream: TextIO | None = None):
        self.total, self.first, self.stream = total, first, stream or sys.stderr
        self.live = self.stream.isatty()
        self.began = time.monotonic()
        self.said, self.width = first * 10 // total, 0

    def show(self, done: int, text: str) -> None:
        """Reports that `done` rounds are complete; `text` says what came out."""
        spent = time.monotonic() - self.began
        left = spent / max(done - self.first, 1) * (self.total - done)
        line = f"round {done}/{self.total}  {text}  {clock(spent)} (ETA {clock(left)})"
        if self.live:
            line = line[: shutil.get_terminal_size().columns - 1]
            self.stream.write("\r" + line.ljust(self.width))
            self.width = len(line)
        elif done == self.total or done * 10 // self.total > self.said:
            self.said = done * 10 // self.total
            self.stream.write(line + "\n")
        self.stream.flush()

    def close(self) -> None:
        """Ends the live line."""
        if self.live and self.width:
            self.stream.write("\n")
            self.stream.flush()
            self.width = 0


def clock(seconds: float) -> str:
    """Minutes and seconds.

    >>> clock(83.4)
    '1:23'
    """
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def human(size: float) -> str:
    """Bytes for people, in powers of ten.

    >>> human(83_456)
    '83.5 kB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.95:
            return f"{size:.3g} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
