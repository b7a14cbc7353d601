"""Seconds to synchronise the second moments of a whole model: `mean`, `median` and `ajive`.

    python -m experiments.bench.shared_signal [--repeats=20]

Kernels whose projected moments have one shape `[C, layers, r, n]` are synced in one call, and all
calls of a model are one jitted program, as in a server's round. One row a model, medians of the
repeats; the ratio is to the mean.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

from fedgalore_jax.shared_signal import METHODS, synchronise

# name: clients, rank, signal rank, {output side n: kernels of that n}
MODELS = {
    "small ViT": (10, 4, 2, {64: 4 * 5, 256: 4}),
    "ViT-Tiny": (8, 8, 4, {192: 12 * 5, 768: 12}),
    "RoBERTa-base": (8, 8, 4, {768: 12 * 5, 3072: 12}),
}


def moments(clients, rank, groups, key):
    """Positive blocks with a common column profile, a row energy and individual noise."""

    def one(key, n, kernels):
        profile, energy, noise = (
            jax.random.exponential(jax.random.fold_in(key, i), shape)
            for i, shape in enumerate([(kernels, 1, n), (kernels, rank, 1), (kernels, rank, n)])
        )
        alone = jax.random.exponential(jax.random.fold_in(key, 3), (clients, *noise.shape))
        return (profile * energy)[None] * (1 + 0.3 * alone)

    return [one(jax.random.fold_in(key, n), n, kernels) for n, kernels in groups.items()]


def seconds(run, *args, repeats):
    """Median of `repeats` warm calls."""
    jax.block_until_ready(run(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(*args))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def server(name, method):
    """A jitted server step of one model and its arguments: what is timed must not be a constant to XLA."""
    clients, rank, signal_rank, groups = MODELS[name]
    stacks = moments(clients, rank, groups, jax.random.key(0))

    @jax.jit
    def run(stacks, weights):
        options = {"method": method, "signal_rank": signal_rank}
        return [synchronise(stack, weights, **options) for stack in stacks]

    return run, (stacks, jnp.full(clients, 1 / clients))


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20)
    repeats = parser.parse_args().repeats
    print(f"{jax.devices()[0].device_kind}, {repeats} repeats, milliseconds a server round")
    print(f"{'model':14}{'method':8}{'median':>10}{'ratio':>8}{'joint ranks':>16}")
    for name in MODELS:
        base = None
        for method in METHODS:
            run, args = server(name, method)
            took = seconds(run, *args, repeats=repeats)
            base = base or took  # the mean comes first
            ranks = jnp.concatenate([rank for _, rank in run(*args)])
            spread = f"{ranks.min()}..{ranks.max()}" if method == "ajive" else "-"
            print(f"{name:14}{method:8}{1e3 * took:10.2f}{took / base:8.1f}{spread:>16}")


if __name__ == "__main__":
    main()
