"""The text of a compiled program."""

import collections
import math
import re


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The instructions of each computation, a line each, and the name of the one that begins."""
    bodies: dict[str, list[str]] = collections.defaultdict(list)
    name = entry = ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = head[2]
            entry = name if head[1] else entry
        else:
            bodies[name].append(line)
    return bodies, entry


def arrays(type: str) -> list[tuple[str, list[int]]]:
    """Dtype and shape of an array, or of each array of a tuple; libraries' scratch space is left out."""
    found = re.findall(r"\b(pred|[bfsu]f?\d+)\[([\d,]*)\]", type)
    return [(dtype, [int(n) for n in re.findall(r"\d+", shape)]) for dtype, shape in found if dtype != "s8"]


def size(type: str) -> int:
    """Bytes of an array or a tuple."""
    bits = [(int(dtype.strip("bfsupred") or 8), shape) for dtype, shape in arrays(type)]
    return sum(n * math.prod(shape) for n, shape in bits) // 8
