"""Rounds on one GPU: checked, timed, and set against PyTorch, in one table.

    python -m experiments.bench.gpu [--repeats=5] [--without_peers]

Eight clients x ten local steps x batch 16, rank 8, bfloat16 products; RoBERTa-base reads 128 tokens, ViT-B/16
an image of 224 pixels. Programs are compiled beside each other, then each is timed alone. TFLOP/s counts
needed work: forward products, and backward ones to activations. Memory is the compiled program's, arguments
and temporaries. PyTorch trains two of the eight clients, one after the other, and its seconds are times four.
"""

import argparse
import functools
import os
import time
from concurrent import futures
from typing import NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.7")  # the rest is PyTorch's

import jax
import jax.numpy as jnp

from experiments.bench import shared_signal
from experiments.bench.peers import PEERS
from experiments.bench.round import BATCH, LENGTH, SHAPES, Server, build
from fedgalore_jax import adapters, engine
from fedgalore_jax.models import layers
from fedgalore_jax.types import Adapted

STEPS, MEASURED, CLIENTS = 10, 2, 8


class Row(NamedTuple):
    """One program of the table."""

    shape: str
    variant: str
    clients: int = CLIENTS
    chunk: int | None = None


ROWS = (
    Row("roberta-base", "factored ajive"),
    Row("roberta-base", "factored own"),
    Row("roberta-base", "fedit"),
    Row("roberta-base", "factored ajive", 32, 8),
    Row("roberta-base", "factored ajive", 128, 8),
    Row("vit-b16", "factored ajive"),
)
MANY = Row("roberta-base", "factored ajive", 1024, 8)
"""Takes half a minute, and comes last."""


def check() -> None:
    """What a GPU does in its own way, against the plain way in float32."""
    key = jax.random.key(0)
    for length in (128, 197):
        q, k, v = (jax.random.normal(jax.random.fold_in(key, i), (2, 4, length, 12, 64)) for i in range(3))

        def loss(*x):
            return jax.vmap(layers.attend)(*x).astype(jnp.float32).var()

        wide = jax.jit(jax.grad(loss))(q, k, v)
        half = jax.jit(jax.grad(loss))(*(x.astype(jnp.bfloat16) for x in (q, k, v)))
        print(f"fused attention, {length} tokens: gradients differ by {differs(half, wide):.4f}")
    x, base, a, b = (
        jax.random.normal(jax.random.fold_in(key, i), shape)
        for i, shape in enumerate([(8, 2048, 768), (768, 768), (768, 8), (8, 8, 768)])
    )

    def merged(x, b):
        ys = jax.vmap(lambda x, b: adapters.matmuls(x, [Adapted(base, a, b)])[0])(x, b)
        return ys.astype(jnp.float32).var()

    def plain(x, b):
        return ((x @ base) + (x @ a) @ b).var()

    wide = jax.jit(jax.grad(plain, 1))(x, b)
    half = jax.jit(jax.grad(merged, 1))(x.astype(jnp.bfloat16), b)
    print(f"merged adapters: gradients differ by {differs(half, wide):.4f}", flush=True)


def differs(ours: jax.Array, theirs: jax.Array) -> float:
    """The largest difference, over the largest number."""
    return float(abs(ours.astype(jnp.float32) - theirs).max() / abs(theirs).max())


def teraflop(row: Row) -> float:
    """Needed work of a round, in 1e12 operations."""
    sizes = SHAPES[row.shape]
    width, depth, inner = (sizes[name] for name in ("hidden_size", "num_hidden_layers", "intermediate_size"))
    tokens = LENGTH if "vocab_size" in sizes else (sizes["image_size"] // sizes["patch_size"]) ** 2 + 1
    kernels = 2 * depth * (4 * width**2 + 2 * width * inner)
    attention = 4 * depth * tokens * width
    return 1e-12 * row.clients * STEPS * BATCH * tokens * (2 * kernels + 3 * attention)


def started(row: Row, pool: futures.Executor) -> tuple[futures.Future, tuple]:
    """A row's program, being compiled beside others, and what it is called with."""
    machine, state, plan = build(
        SHAPES[row.shape], row.variant, STEPS, clients=row.clients, chunk=row.chunk, precision="bf16"
    )
    lowered = machine.program().lower(state, machine.train, plan, 1)

    def finish():
        began = time.perf_counter()
        return engine.compiled(lowered), time.perf_counter() - began

    return pool.submit(finish), (state, machine.train, plan, 1)


def show(row: Row, took: float, job: futures.Future) -> None:
    """Prints a row."""
    program, compiling = job.result()
    memory = program.memory_analysis()
    total = (memory.temp_size_in_bytes + memory.argument_size_in_bytes) / 2**30
    print(
        f"{row.shape + ' ' + row.variant:34}{row.clients:8}{took:9.3f}"
        f"{teraflop(row) / took:9.0f}{total:7.2f}{compiling:11.0f}",
        flush=True,
    )


def ours(repeats: int, jobs: dict[Row, tuple]) -> dict[Row, float]:
    """Prints our rows but the last, and gives their seconds."""
    print(f"\n{'':34}{'clients':>8}{'s/round':>9}{'TFLOP/s':>9}{'GiB':>7}{'compile s':>11}", flush=True)
    took = {}
    for row in ROWS:
        job, args = jobs[row]
        took[row] = shared_signal.seconds(job.result()[0], *args, repeats=repeats)
        show(row, took[row], job)
    return took


def many(job: futures.Future, args: tuple) -> None:
    """Prints the last row, from one round."""
    program, began = job.result()[0], time.perf_counter()
    jax.block_until_ready(program(*args))
    show(MANY, time.perf_counter() - began, job)


def peak(job: futures.Future, args: tuple) -> None:
    """Prints what the card held during a round, and what its program said: nothing larger ran before."""
    program, held = job.result()[0], counter("bytes_in_use")
    jax.block_until_ready(program(*args))
    memory = program.memory_analysis()
    needs = held + memory.temp_size_in_bytes + memory.output_size_in_bytes
    print(f"a round held {counter('peak_bytes_in_use') / 2**30:.2f} GiB, predicted {needs / 2**30:.2f} GiB")


def counter(name: str) -> int:
    """One of the card's, in bytes."""
    return (jax.devices()[0].memory_stats() or {})[name]


def server(repeats: int) -> None:
    """Prints the server's synchronisation of a RoBERTa-base's second moments."""
    run, args = shared_signal.server("RoBERTa-base", "ajive")
    took = shared_signal.seconds(run, *args, repeats=repeats)
    print(f"\nAJIVE of 72 kernels' moments, 8 clients: {1e3 * took:.1f} ms", flush=True)


def peers(servers: dict[tuple[str, str], futures.Future], took: dict[Row, float]) -> None:
    """Prints PyTorch's rows, and how many times ours is faster."""
    print(f"\n{'PyTorch':34}{'s/round':>9}{'GiB':>7}{'over ours':>11}")
    for (shape, peer), ready in servers.items():
        each, megabytes = ready.result().round()
        ready.result().process.kill()
        each *= CLIENTS / MEASURED
        ratio = each / took[Row(shape, "factored ajive")]
        print(f"{shape + ' ' + peer:34}{each:9.2f}{megabytes * 1e6 / 2**30:7.2f}{ratio:11.1f}", flush=True)


def main() -> None:
    """Prints everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--without_peers", action="store_true", help="where PyTorch is not installed")
    args = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.exit(2, "no GPU: experiments.bench.round compares methods on a CPU\n")
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    pool = futures.ThreadPoolExecutor()
    start = functools.partial(Server, module="peers")
    servers = {
        (shape, peer): pool.submit(start, shape, peer, STEPS, MEASURED)
        for shape in ("roberta-base", "vit-b16")
        for peer in PEERS
        if not args.without_peers
    }
    check()
    jobs = {ROWS[0]: started(ROWS[0], pool)}
    peak(*jobs[ROWS[0]])  # before others are compiled, which tries out products on the card
    jobs |= {row: started(row, pool) for row in (*ROWS[1:], MANY)}
    futures.wait([job for job, _ in jobs.values()] + list(servers.values()))
    took = ours(args.repeats, jobs)
    server(args.repeats)
    if servers:
        peers(servers, took)
    print()
    many(*jobs[MANY])


if __name__ == "__main__":
    main()
