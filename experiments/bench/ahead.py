"""Rounds compiled for an H100 that is not there: seconds, memory, and what their programs will have to do.

    pip install "jax[cuda13]"
    python -m experiments.bench.ahead [--kernels=N] [--variants=V,...] [SHAPE ...]

Eight clients x ten local steps x batch 16, rank 8, bfloat16 products, as in `experiments.bench.gpu`. `least
ms`: no kernel is faster than the card's bandwidth lets its bytes pass, and its rate the operations of its
products; summed over a round. Measured rounds took 1.3 to 1.4 times that. Compiling tunes nothing here.
"""

import argparse
import collections
import math
import os
import re
import time
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

if __name__ == "__main__":  # the CUDA build compiles; nothing of it runs
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from jax.experimental import topologies

from experiments.bench.program import arrays, computations, size
from experiments.bench.round import CLIENTS, SHAPES, VARIANTS, build
from fedgalore_jax import engine

STEPS = 10
BANDWIDTH = 3.0e12
"""Bytes a second that an H100 reaches on large arrays."""
RATES = {"bf16": 790e12, "f32": 400e12}
"""Operations a second, of large products in bfloat16 and in TF32."""
CARD = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000 device_memory_size: 84942979072 l2_cache_size: 52428800
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}
"""
NOT_LAUNCHED = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "conditional"}
"""A conditional is a refresh of the basis, due every few rounds."""


class Kernel(NamedTuple):
    """What is launched.

    Attributes:
      name: a library's, a fusion's, or the operation's.
      makes: the type of its result.
      scope: where it comes from, by JAX's names.
      times: launches in a round.
      bytes: read and written, of one launch.
      seconds: the least that it can take, of one launch.
    """

    name: str
    makes: str
    scope: str
    times: int
    bytes: int
    seconds: float


class Line(NamedTuple):
    """An instruction of a program's text: `name = type op(operands), rest`."""

    name: str
    type: str
    op: str
    operands: list[str]
    rest: str

    def named(self, pattern: str, default: str | None = None) -> str:
        """What a group of a pattern matches in its attributes."""
        found = re.search(pattern, self.rest)
        if not found and default is None:
            raise ValueError(f"{self.name}: nothing like {pattern!r} in {self.rest[:200]!r}")
        return found[1] if found else str(default)


def kernels(program: str) -> list[Kernel]:
    """What a round launches, from a compiled program's text."""
    lines, entry = computations(program)
    bodies = {name: [*filter(None, map(_parsed, body))] for name, body in lines.items()}
    return list(_launched(bodies, entry, 1))


def _parsed(text: str) -> Line | None:
    line = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$", text)
    return line and Line(*line.groups()[:3], re.findall(r"%([\w.\-]+)", line[4].split(")")[0]), line[4])


def _launched(bodies: dict[str, list[Line]], name: str, times: int) -> Iterator[Kernel]:
    types = {line.name: line.type for line in bodies[name]}
    for line in bodies[name]:
        if line.op == "while":  # the count of rounds is not known while compiling: one
            count = int(line.named(r'"known_trip_count":\{"n":"(\d+)"', "1"))
            yield from _launched(bodies, line.named(r"body=%?([\w.\-]+)"), times * count)
        elif line.op == "call":
            yield from _launched(bodies, line.named(r"to_apply=%?([\w.\-]+)"), times)
        elif line.op not in NOT_LAUNCHED:
            called, seconds = line.op, 0.0
            moved = sum(size(types.get(x, "")) for x in line.operands) + size(line.type)
            if line.op == "fusion":
                called = "fusion, " + line.named(r"kind=k(\w+)")
                moved = _fused(bodies[line.named(r"calls=%?([\w.\-]+)")])
            elif line.op == "custom-call":
                called = line.named(r'custom_call_target="([^"]*)"')
            if "matmul" in called:
                (dtype, left), *_ = arrays(types[line.operands[0]])
                axes = line.named(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
                operations = 2 * math.prod(left[int(axis)] for axis in re.findall(r"\d+", axes))
                operations *= math.prod(arrays(line.type)[0][1])
                called, seconds = f"{called} {dtype}", operations / RATES[dtype]
            scope = line.named(r'op_name="([^"]*)"', "")
            yield Kernel(called, line.type, scope, times, moved, max(seconds, moved / BANDWIDTH))


def _fused(body: list[Line]) -> int:
    """Bytes that a fusion reads and writes; of what it slices or updates in place, that part alone."""
    lines, users = {line.name: line for line in body}, collections.defaultdict(list)
    for line in body:
        for i, operand in enumerate(line.operands):
            users[operand].append((line, i))

    def read(x: Line) -> int:
        if all(user.op in ("slice", "dynamic-slice", "gather") and i == 0 for user, i in users[x.name]):
            return min(size(x.type), sum(size(user.type) for user, _ in users[x.name]))
        updated = all(user.op == "dynamic-update-slice" and i == 0 for user, i in users[x.name])
        return 0 if updated else size(x.type)

    def written(x: Line) -> int:
        if x.op in ("tuple", "bitcast"):
            return sum(written(lines[operand]) for operand in x.operands)
        return size(lines[x.operands[1]].type if x.op == "dynamic-update-slice" else x.type)

    return sum(read(x) for x in body if x.op == "parameter") + written(body[-1])


def card() -> jax.Device:
    """What to compile for."""
    jax.devices()  # finds the CUDA build
    return topologies.get_topology_desc(platform="cuda", target_config=CARD, topology="1x1x1").devices[0]


def lowered(machine: engine.Engine, *args) -> jax.stages.Lowered:
    """The program of rounds, traced for the card."""
    place = jax.sharding.SingleDeviceSharding(card())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), args)
    return machine.program().trace(*shapes).lower(lowering_platforms=("cuda",))


def least(launched: list[Kernel]) -> float:
    """Milliseconds that kernels take in a round, at the least."""
    return 1e3 * sum(k.times * k.seconds for k in launched)


def show(shape: str, variant: str, longest: int) -> None:
    """Prints a program's row, and its longest kernels."""
    machine, state, plan = build(SHAPES[shape], variant, STEPS, chunk=CLIENTS, precision="bf16")
    with mock.patch.object(jax, "default_backend", lambda: "gpu"):
        began = time.perf_counter()
        rounds = engine.compiled(lowered(machine, state, machine.train, plan, jax.numpy.int32(1)))
        took = time.perf_counter() - began
    launched = kernels(rounds.as_text())
    memory = rounds.memory_analysis()
    held = (memory.temp_size_in_bytes + memory.argument_size_in_bytes) / 2**30
    launches, moved = sum(k.times for k in launched), sum(k.times * k.bytes for k in launched) / 1e9
    print(
        f"{shape + ' ' + variant:34}{took:11.0f}{held:7.2f}{launches:10}{moved:7.0f}{least(launched):10.1f}",
        flush=True,
    )
    groups: dict[tuple, list[Kernel]] = collections.defaultdict(list)
    for k in launched:
        groups[k.name, k.makes, k.bytes, re.sub(r"\d+", "", k.scope)].append(k)
    for group in sorted(groups.values(), key=least, reverse=True)[:longest]:
        times = sum(k.times for k in group)
        print(
            f"  {least(group):7.2f} ms {times:6} x {group[0].bytes / 1e6:7.1f} MB  {group[0].name:34}"
            f"{group[0].makes[:40]:42}{group[0].scope[-60:]}"
        )


def main() -> None:
    """Prints a row for each program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="*", help=f"of {', '.join(SHAPES)}; roberta-base by default")
    parser.add_argument("--variants", default="factored ajive,factored own,fedit", help="comma-separated")
    parser.add_argument("--kernels", type=int, default=0, help="how many to print, the longest first")
    args = parser.parse_args()
    variants = args.variants.split(",")
    if unknown := [*({*args.shapes} - {*SHAPES}), *({*variants} - {*VARIANTS})]:
        parser.error(f"unknown {unknown[0]!r}: shapes {', '.join(SHAPES)}; variants {', '.join(VARIANTS)}")
    try:
        card()
    except NotImplementedError as error:
        parser.exit(2, f'ahead.py: no compiler for NVIDIA cards, pip install "jax[cuda13]": {error}\n')
    print(f"{'':34}{'compile s':>11}{'GiB':>7}{'launches':>10}{'GB':>7}{'least ms':>10}")
    for shape in args.shapes or ["roberta-base"]:
        for variant in variants:
            show(shape, variant, args.kernels)


if __name__ == "__main__":
    main()
