"""Runs spread over devices, in a process that was given so many.

python tests/spread.py OUT.npz     eight devices: runs all of `CASES` and writes what they learned
"""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import tiny_vit

from fedgalore_jax import aggregators, blocks, engine, placement, tasks, tree
from fedgalore_jax.data import FederatedData, Split
from fedgalore_jax.strategies import build

N, COHORT, K, B = 10, 7, 2, 4
CASES = {
    # name: method, options, mesh, chunk, 64-bit; the last streams data and drops what is wild
    "rows of clients": ("fedgalore", {"signal_rank": 1}, "8x1", 8, False),
    "rows and weights": ("fedgalore", {"signal_rank": 1, "weight_decay": 0.1}, "4x2", 4, True),
    "memories": ("scaffold", {"clip": 5.0}, "4x2", 4, True),
}


def machine(name, mesh, streams):
    method, options, _, chunk, wide = CASES[name]
    fns, params = tiny_vit.model()
    dtype = jnp.float64 if wide else jnp.float32
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    params = placement.weights(mesh, params)
    rng = np.random.default_rng(5)
    pixels = rng.normal(size=(60, 6, 6, 3)).astype(dtype)
    train = engine.on_device(Split({"pixel_values": pixels}, rng.integers(0, 5, 60)), mesh, streams=streams)

    def loss(params, batch, key):
        return tasks.cross_entropy(fns.apply(params, batch, key=key), batch)

    strategy = build(method, lr=0.05, rank=3, **options)
    kind = aggregators.build("trimmed_mean" if name == "memories" else "mean")
    return engine.Engine(strategy, loss, train, N, K, chunk, mesh, streams, kind), params


def run(name, mesh=None, streams=False):
    """Two rounds; `{path: array}` of the model, the memories and the losses, and the compiled program."""
    it, params = machine(name, mesh, streams)
    state = engine.init(it.strategy, params, jax.random.key(0), N, mesh)
    plan = FederatedData(np.split(np.arange(60), N), 3).plan(range(2), COHORT, K, B, it.chunk)
    train, plan = blocks.load(it, plan, blocks.Blocks(2, None, 6 if streams else 0))
    program = it.program().lower(state, train, plan, 2).compile()
    after, metrics = engine.run(program, state, train, plan, 2)
    for (path, new), (_, old) in zip(*map(jax.tree.leaves_with_path, (after, state)), strict=True):
        same = new.sharding.is_equivalent_to(old.sharding, new.ndim)
        assert same and jax.typeof(new) == jax.typeof(old), (path, new.sharding, old.sharding)
    out = dict(tree.flatten(it.strategy.export(after.server))) | {"loss": metrics["train_loss"]}
    out |= {f"memory {i}": x for i, x in enumerate(jax.tree.leaves(after.clients))}
    return {path: np.asarray(x) for path, x in out.items()}, program, after


def sizes(shape):
    """Of a shape, without axes of one element, in any order."""
    return ",".join(sorted(str(n) for n in shape if int(n) != 1))


def gathered(program):
    """The `sizes` of whatever is gathered from several devices."""
    found = re.findall(r"= \(?\w+\[([\d,]+)\][^=]* all-gather", program.as_text())
    return np.array(sorted({sizes(shape.split(",")) for shape in found}), str)


def summed(program):
    """How many sums over devices a local step has, forward and back."""
    lines = program.as_text().splitlines()
    return sum("jvp" in line and re.search(r" all-reduce(-start)?\(", line) is not None for line in lines)


def main(out):
    results = {}
    for name, (_, _, shape, _, wide) in CASES.items():
        with jax.enable_x64(wide):
            mesh = placement.mesh(shape)
            arrays, program, state = run(name, mesh, name == "memories")
            results[f"{name}|digest"] = tree.digest(machine(name, mesh, False)[1])
        results |= {f"{name}|{path}": x for path, x in arrays.items()}
        results[f"{name}|gathered"], results[f"{name}|summed"] = gathered(program), summed(program)
        kernel = (state.server.params if "rows" in name else state.server.trainable)["layers/output/kernel"]
        results[f"{name}|share"] = np.asarray(kernel.addressable_shards[0].data.shape)
    remembered = state.clients["layers/output/kernel"]  # of the last case
    results["memories|memory"] = np.asarray(remembered.addressable_shards[0].data.shape)
    np.savez(out, **results)


if __name__ == "__main__":
    main(sys.argv[1])
