"""Rounds compiled for TPUs that are not there: memory of a chip, and what chips send each other.

    pip install "jax[tpu]"
    python -m experiments.bench.pods [roberta] [roberta-shared] [llama] [methods]

`roberta`: RoBERTa-base, 128 tokens x batch 16, ten steps, a client on each of 16 chips.
`roberta-shared`: the same with two chips a model, and eight clients.
`llama`: 7B parameters on 256 chips, eight a model, a client on each of these groups, 512 tokens, four steps.
`methods`: a small ViT by every method, two clients on each of four chips.

FedGaLore at rank 8 and bfloat16 products, but for `methods`. Arrays are abstract: nothing of such a size is
allocated. What is sent is told by the loop that it stands in: once a round, a local step or a layer. libtpu
compiles for one process of a machine at a time.
"""

import argparse
import collections
import os
import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

if __name__ == "__main__":  # the TPU compiler runs; nothing of what it makes does
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    os.environ |= {"TPU_ACCELERATOR_TYPE": "v5litepod-16", "TPU_WORKER_HOSTNAMES": "localhost"}

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from experiments.bench.program import computations, size
from experiments.bench.round import BATCH, LABELS, LENGTH, RANK, SHAPES
from fedgalore_jax import engine, placement, strategies, tasks
from fedgalore_jax.client import Loss
from fedgalore_jax.data import FederatedData
from fedgalore_jax.models import ModelFns, llama, roberta, vit
from fedgalore_jax.progress import human
from fedgalore_jax.strategies.base import Strategy

LLAMA = dict(
    model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=32, head_dim=128, max_position_embeddings=4096,
)  # fmt: skip
NAMES = ("roberta", "roberta-shared", "llama", "methods")
LOOPS = ("round", "step", "layer")
SENDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


class Program(NamedTuple):
    """What is compiled.

    Attributes:
      title: of its row.
      chips: such as "v5e:4x4".
      mesh: clients x model, such as "16x1".
      fns, loss, strategy: what is trained, and how.
      sample: shape and dtype of a sample's arrays.
      batch: samples in one.
      steps: K.
      each: clients on a share of the mesh.
    """

    title: str
    chips: str
    mesh: str
    fns: ModelFns
    loss: Loss
    strategy: Strategy
    sample: dict[str, tuple[tuple[int, ...], Any]]
    batch: int
    steps: int
    each: int = 1


def programs(name: str) -> Iterator[Program]:
    """Those of one of `NAMES`."""
    labels = tuple(map(str, range(LABELS)))
    fedgalore = {"lr": 1e-3, "rank": RANK}

    def classifier(fns):
        return fns, lambda params, batch, key: tasks.cross_entropy(fns.apply(params, batch, key=key), batch)

    def decoder(fns):
        return fns, lambda params, batch, key: tasks.get("sft").loss(fns.apply(params, batch, key=key), batch)

    if name == "methods":
        config = vit.Config(**SHAPES["digits-vit"] | {"num_hidden_layers": 2}, labels=labels)
        model = classifier(vit.build(config, precision="bf16"))
        sample = {"pixel_values": ((8, 8, 1), jnp.float32), "labels": ((), jnp.int32)}
        for method in strategies.names():
            yield Program(
                method, "v5e:2x2", "4x1", *model, strategies.build(method, lr=1e-3, rank=4), sample, 8, 3, 2
            )
    elif name == "llama":
        fns = llama.build(
            llama.Config(**LLAMA, rope=llama.Rope()), precision="bf16", scan_layers=True, remat=True
        )
        roles = (("layers/.*kernel", "adapt"), (".*", "freeze"))
        strategy = strategies.build("fedgalore", **fedgalore, roles=roles)
        sample = dict.fromkeys(("input_ids", "attention_mask", "labels"), ((512,), jnp.int32))
        yield Program("Llama 7B, v5e:16x16, 32x8", "v5e:16x16", "32x8", *decoder(fns), strategy, sample, 1, 4)
    else:
        model = classifier(
            roberta.build(roberta.Config(**SHAPES["roberta-base"], labels=labels), precision="bf16")
        )
        sample = {"input_ids": ((LENGTH,), jnp.int32), "labels": ((), jnp.int32)}
        shape = "16x1" if name == "roberta" else "8x2"
        title = f"RoBERTa-base, v5e:4x4, {shape}"
        yield Program(
            title, "v5e:4x4", shape, *model, strategies.build("fedgalore", **fedgalore), sample, BATCH, 10
        )


def compiled(program: Program) -> jax.stages.Compiled:
    """The rounds of a program."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=program.chips).devices
    mesh = placement.mesh(program.mesh, devices)
    clients, batch, steps = placement.shares(mesh) * program.each, program.batch, program.steps

    def whole(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement.whole(mesh))

    train = {
        name: whole(jax.ShapeDtypeStruct((clients * batch, *shape), dtype))
        for name, (shape, dtype) in program.sample.items()
    }
    machine = engine.Engine(program.strategy, program.loss, train, clients, steps, clients, mesh)
    key = jax.random.key(0)
    params = jax.eval_shape(program.fns.init, key)
    state = jax.eval_shape(lambda params: engine.init(program.strategy, params, key, clients, mesh), params)
    state = placement.placed(state, engine.shardings(program.strategy, state, mesh))
    parts = [np.arange(c * batch, (c + 1) * batch) for c in range(clients)]
    plan = jax.tree.map(whole, FederatedData(parts, 0).plan(range(1), clients, steps, batch))
    traced = machine.program().trace(state, train, plan, whole(jnp.int32(1)))
    return engine.compiled(traced.lower(lowering_platforms=("tpu",)))


def collectives(text: str) -> dict[tuple[str, str], tuple[int, int]]:
    """How many there are by loop and kind, and the bytes that they leave on a chip, from a program's text."""
    bodies, entry = computations(text)
    fused = {
        called
        for body in bodies.values()
        for line in body
        for called in re.findall(r"calls=%([\w.\-]+)", line)
    }
    totals: dict[tuple[str, str], tuple[int, int]] = collections.defaultdict(lambda: (0, 0))
    waiting, seen = [(entry, -1)], set()  # the entry holds the loop over rounds
    while waiting:
        name, depth = here = waiting.pop()
        if here in seen:
            continue
        seen.add(here)
        body = bodies[name]
        # One that is hidden behind other work stands in several fusions, of which one starts it.
        counts = name not in fused or any("AsyncCollectiveStart" in line for line in body)
        for line in body:
            for called in {*re.findall(r"%([\w.\-]+)", line)} & {*bodies} - {name}:
                waiting.append(
                    (called, depth + bool(re.search(rf"body=%{re.escape(called)}[,\s]", line + "\n")))
                )
            if counts and (sent := re.search(rf"= (\(.*?\)|\S+) ({SENDS})\(", line)):
                place = LOOPS[min(max(depth, 0), 2)], sent[2]
                number, before = totals[place]
                totals[place] = number + 1, before + size(sent[1])
    return dict(sorted(totals.items(), key=lambda row: (LOOPS.index(row[0][0]), row[0][1])))


def show(program: Program) -> None:
    """Prints a program's row, and what is sent."""
    began = time.perf_counter()
    with mock.patch.object(jax, "default_backend", lambda: "tpu"):
        rounds = compiled(program)
    memory, took = rounds.memory_analysis(), time.perf_counter() - began
    arguments, temporary = human(memory.argument_size_in_bytes), human(memory.temp_size_in_bytes)
    print(f"{program.title:34}{arguments:>12}{temporary:>13}{took:11.0f}", flush=True)
    for (loop, kind), (count, made) in collectives(rounds.as_text()).items():
        print(f"    in a {loop:6}{count:5} {kind:20}{human(made):>10}", flush=True)


def main() -> None:
    """Prints what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=f"of {', '.join(NAMES)}; all by default")
    args = parser.parse_args()
    if unknown := {*args.names} - {*NAMES}:
        parser.error(f"unknown {min(unknown)!r}: give some of {', '.join(NAMES)}")
    try:
        topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        parser.exit(2, f'pods.py: no compiler for TPUs, pip install "jax[tpu]": {reason}\n')
    print(f"{'on a chip':34}{'arguments':>12}{'temporaries':>13}{'compile s':>11}")
    for name in args.names or NAMES:
        for program in programs(name):
            show(program)


if __name__ == "__main__":
    main()
