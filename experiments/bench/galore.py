"""What GaLore costs: its subspace finders against the SVD, its step against plain Adam's.

    python -m experiments.bench.galore [--repeats 5] [--rank 8]

Medians over repeats, variants taking turns so that a busy machine slows them alike. Steps are
scanned with params and state donated, as in training. The target is a step without a refresh within
1.3 times plain Adam's.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import optax

from fedgalore_jax.galore import galore
from fedgalore_jax.lowrank import FINDERS, leading_subspace

KERNELS = {"4 x 768 x 768": (4, 768, 768), "768 x 3072": (768, 3072)}
CLIENTS = 8


def medians(variants, repeats):
    """Median seconds of each `{name: function}`, taking turns after one call to warm up."""
    seconds = {name: [] for name in variants}
    for repeat in range(repeats + 1):
        for name, call in variants.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def table(title, rows, baseline):
    """Prints `{label: {variant: seconds}}` in milliseconds and as ratios to one variant."""
    print(f"\n{title}\n{'':16}" + "".join(f"{name:>22}" for name in next(iter(rows.values()))))
    for label, seconds in rows.items():
        cells = (f"{1e3 * s:9.2f} ms  {s / seconds[baseline]:6.3f}x" for s in seconds.values())
        print(f"{label:16}" + "".join(f"{cell:>22}" for cell in cells))


def finders(shape, rank, repeats):
    """Seconds of every finder on a Gaussian matrix, which has no gap to make it easy."""
    key = jax.random.key(0)
    matrix = jax.random.normal(key, shape)

    def variant(finder):
        run = jax.jit(lambda g: leading_subspace(g, rank, finder=finder, key=key))
        return lambda: run(matrix)

    return medians({finder: variant(finder) for finder in FINDERS}, repeats)


def steps(shape, rank, repeats, clients=None, inner_steps=10):
    """Seconds a step of plain Adam and of GaLore, over a scan, with and without a refresh due.

    Args:
      shape: of the kernel.
      rank: of GaLore.
      repeats: how many runs the median is over.
      clients: vmap over as many, with un-batched counters; None: one client, no vmap.
      inner_steps: scan length; 'refresh due' refreshes on every step, 'none due' on no timed step.
    """
    stack = () if clients is None else (clients,)
    grads = jax.random.normal(jax.random.key(1), (*stack, *shape))

    def variant(tx):
        def run(grads, params, state):
            def step(carry, _):
                params, state = carry
                updates, state = tx.update(grads, state, params)
                return (optax.apply_updates(params, updates), state), None

            return jax.lax.scan(step, (params, state), length=inner_steps)[0]

        one = jnp.zeros(shape)
        state = tx.init(one)
        _, state = tx.update(grads if clients is None else grads[0], state, one)  # past update 0
        if clients is not None:  # counters stay un-batched
            counter = jax.tree_util.tree_map_with_path(
                lambda path, _: jax.tree_util.keystr(path).endswith(".count"), state
            )
            axes = jax.tree.map(lambda shared: None if shared else 0, counter)
            run = jax.vmap(run, in_axes=(0, 0, axes), out_axes=(0, axes))
            state = jax.tree.map(
                lambda shared, leaf: leaf if shared else jnp.stack([leaf] * clients), counter, state
            )
        run = jax.jit(run, donate_argnums=(1, 2))
        held = [jnp.zeros((*stack, *shape)), state]

        def call():
            held[:] = run(grads, *held)
            return held

        return call

    variants = {
        "adam": variant(optax.adam(1e-3)),
        "galore, none due": variant(galore(1e-3, rank, refresh_every=10**9)),
        "galore, refresh due": variant(galore(1e-3, rank, refresh_every=1)),
    }
    return {name: s / inner_steps for name, s in medians(variants, repeats).items()}


def main():
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rank", type=int, default=8)
    arguments = parser.parse_args()
    rank, repeats = arguments.rank, arguments.repeats
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, rank {rank}, median of {repeats}")
    rows = {label: finders(shape, rank, max(repeats // 2, 1)) for label, shape in KERNELS.items()}
    table("one basis (stack of bases)", rows, "svd")
    rows = {label: steps(shape, rank, repeats) for label, shape in KERNELS.items()}
    table("a step", rows, "adam")
    rows = {label: steps(shape, rank, repeats, CLIENTS) for label, shape in KERNELS.items()}
    table(f"a step, {CLIENTS} clients under vmap", rows, "adam")


if __name__ == "__main__":
    main()
