"""Two processes of two devices each, whose hosts keep data and memories: what each of them gathers.

python tests/own_rows.py PORT PROCESS             what travels with a block, in both processes
python tests/own_rows.py PORT PROCESS OUT.npz     and what is learned from it
"""

import sys

import jax
import numpy as np

from fedgalore_jax import blocks, engine, hosts, placement, tree
from fedgalore_jax.data import FederatedData

if __name__ == "__main__":  # before the models there ask for devices
    hosts.join(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))

from spread import COHORT, B, K, N, machine

MESHES = ("4x1", "2x2", "1x4")
ROUNDS, CHUNK = 2, 4
PLAN = FederatedData(np.split(np.arange(60), N), 3).plan(range(ROUNDS), COHORT, K, B, CHUNK)
BLOCKS = blocks.Blocks(ROUNDS, slots=12, samples=6)


class Watched(np.ndarray):
    """Remembers which of its rows are asked for by number, and how many numbers are taken of them."""

    asked: set
    taken: int

    def __getitem__(self, where):
        taken = np.asarray(self)[where]
        rows = where[0] if isinstance(where, tuple) else where
        if isinstance(rows, np.ndarray):
            self.asked |= set(rows.ravel().tolist())
            self.taken += taken.size
        return taken


def watched(x):
    x = np.array(x).view(Watched)
    x.asked, x.taken = set(), 0
    return x


def lies_as(x, whole):
    """Each device has its share of an array."""
    for shard in x.addressable_shards:
        np.testing.assert_array_equal(shard.data, whole[shard.index])


def travels(shape):
    """Both processes give their devices the right rows, and gather nothing for the other's."""
    mesh, process = placement.mesh(shape), jax.process_index()
    it, params = machine("memories", mesh, streams=True)
    it = it._replace(train={name: watched(x) for name, x in it.train.items()})
    state = jax.eval_shape(lambda: engine.init(it.strategy, params, jax.random.key(0), N))
    rng = np.random.default_rng(0)
    store = jax.tree.map(lambda x: watched(rng.normal(size=x.shape).astype(x.dtype)), state.clients)
    state = state._replace(clients=store)

    data, plan = blocks.load(it, PLAN, BLOCKS)
    slots = np.resize(blocks.slotted(PLAN, N)[0], BLOCKS.slots)
    lent = blocks.lend(it, state, slots)

    both = shape == "1x4"  # the devices of both train all clients
    trained = slice(None) if both else slice(2 * process, 2 * process + 2)  # of each chunk
    samples = PLAN.samples.reshape(ROUNDS, -1, CHUNK, K * B)[:, :, trained]
    for x in it.train.values():
        assert x.asked == set(samples.ravel().tolist())
    for x, there in zip(*map(jax.tree.leaves, (store, lent)), strict=True):
        shares = {str(shard.index): shard.data.size for shard in there.addressable_shards}
        assert x.taken == sum(shares.values())
        assert x.taken in (there.size, there.size // 2)  # an axis that does not divide is whole
    assert sum(x.taken for x in jax.tree.leaves(store)) < 0.6 * sum(x.size for x in jax.tree.leaves(lent))
    jax.tree.map(lambda x, kept: lies_as(x, np.asarray(kept)[slots]), lent, store)
    rows = plan.samples.reshape(ROUNDS, -1, CHUNK, K * B)
    for name, x in it.train.items():
        for shard in data[name].addressable_shards:
            here = rows[shard.index[:3]]
            got = np.take_along_axis(
                np.asarray(shard.data), here.reshape(*here.shape, *[1] * (x.ndim - 1)), 3
            )
            wanted = PLAN.samples.reshape(rows.shape)[shard.index[:3]]
            np.testing.assert_array_equal(got, np.asarray(x)[wanted])


def learn(mesh=None):
    """Two rounds of SCAFFOLD whose memories the host keeps; `{path: array}` of the model and the memories."""
    it, params = machine("memories", mesh, streams=mesh is not None)
    state = engine.init(it.strategy, params, jax.random.key(0), N, mesh, remember=False)
    state = state._replace(clients=blocks.on_host(it, params, N))
    state, _ = blocks.advance(it.program(), it, state, PLAN, ROUNDS, BLOCKS)
    out = tree.flatten(hosts.fetch(it.strategy.export(state.server)))
    return out | {f"memory {i}": x for i, x in enumerate(jax.tree.leaves(state.clients))}


def main(out=None):
    with jax.enable_x64(True):
        for shape in MESHES:
            travels(shape)
        if out:
            learned = {shape: learn(placement.mesh(shape)) for shape in MESHES}
            np.savez(out, **{f"{shape}|{path}": x for shape, xs in learned.items() for path, x in xs.items()})


if __name__ == "__main__":
    main(*sys.argv[3:])
