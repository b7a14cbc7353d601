"""Blocks of rounds, each one call of a run's program: its plan, and what travels to the devices and back.

The training set is on the devices. With several processes, or where it is large, each block's samples travel
instead, only to the devices that train their client.

Memories of clients stay on the devices while all of them fit. Where they do not, they are NumPy arrays on the
host, and the clients of a block have theirs in *slots* on the devices, whose memory does not depend on N.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedgalore_jax import engine, hosts, placement, tree
from fedgalore_jax.client import Loss
from fedgalore_jax.config import Config
from fedgalore_jax.data import Plan, Split
from fedgalore_jax.types import Array, Params, Tree

ROUNDS = 50
"""Most rounds of a block."""
RESIDENT = 1 << 30
"""Bytes of clients' memories that the devices keep, and of what travels with a block."""
TRAINING_SET = 1 << 33
"""Bytes of a training set that the devices keep, each all of it."""
AT_A_TIME = 64
"""Clients whose first memories are made together."""


class Blocks(NamedTuple):
    """How a run's rounds are cut into calls.

    Attributes:
      rounds: most of a block, the rows of every plan.
      slots: of clients' memories on the devices; None where all N are there.
      samples: of each client that travel with a block; 0 where the training set is on the devices.
    """

    rounds: int
    slots: int | None
    samples: int

    def on_devices(self, memories: Tree) -> Tree:
        """Shapes of the memories there, given those of all clients."""
        if self.slots is None:
            return memories
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((self.slots, *x.shape[1:]), x.dtype), memories)


def streams(train: Split) -> bool:
    """Whether training data travel with each block."""
    return hosts.several() or tree.nbytes(train.arrays) > TRAINING_SET


def cut(config: Config, machine: engine.Engine, most: int, memories: Tree) -> Blocks:
    """Cuts a run: a block is not longer than what travels with it fits.

    Args:
      config: of the run.
      machine: its engine.
      most: samples that a client has.
      memories: shapes of all clients' memories, rows `[N, ...]`.
    """
    rounds, samples, slots = min(config.eval_every, ROUNDS, config.rounds), 0, None
    if machine.streams:
        samples = min(config.local_steps * config.batch_size, most)
        sample = tree.nbytes(machine.train) // len(machine.train["labels"])
        rounds = max(1, min(rounds, RESIDENT // (config.participants * samples * sample)))
    if (needed := tree.nbytes(memories)) > RESIDENT:
        one, shares = needed // config.clients, placement.shares(machine.mesh)
        fewer = max(1, min(rounds, RESIDENT // (config.participants * one)))
        needed = -(-config.participants * fewer // shares) * shares
        if needed < config.clients:
            rounds, slots = fewer, needed
    return Blocks(rounds, slots, samples)


def chunk(config: Config, shares: int, each: Callable[[], int]) -> int:
    """Clients trained at a time, so many on each share of a mesh; empty ones fill it up.

    Args:
      config: of the run; its `chunk`, where it names one.
      shares: of a mesh, 1 without one.
      each: gives the bytes of `activations` that one client's batch takes.

    Raises:
      ValueError: `chunk` does not divide into shares.
    """
    if config.chunk and config.chunk % shares:
        raise ValueError(
            f"chunk={config.chunk} is not usable with mesh={config.mesh!r}: give a multiple of {shares}"
        )
    if config.chunk is None and shares == 1:
        return at_a_time(config.participants, each)
    whole = min(config.chunk or config.participants, config.participants)
    return -(-whole // shares) * shares


NEAR = 2**27
"""Bytes of activations up to which clients are trained together on a CPU. With more they wait for memory:
eight of ViT-Tiny take a third longer at a time than one after the other (docs/design.md, F9)."""


def at_a_time(clients: int, each: Callable[[], int]) -> int:
    """How many of a round's clients to train together: all on an accelerator, on a CPU what `NEAR` holds.

    Args:
      clients: of a round.
      each: gives the bytes of `activations` that one client's batch takes; called on a CPU alone.

    Returns:
      A divisor of `clients`, so that no place stays empty.
    """
    if jax.default_backend() != "cpu":
        return clients
    fit = max(1, NEAR // max(1, each()))
    return max(size for size in range(1, clients + 1) if clients % size == 0 and size <= fit)


def activations(loss: Loss, params: Params, train: engine.Data, size: int) -> int:
    """Bytes that a backward pass is handed of a batch of so many samples, weights aside; nothing is run."""
    batch = {name: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype) for name, x in train.items()}
    batch["weight"] = jax.ShapeDtypeStruct((size,), jnp.float32)

    def kept(params, batch, key):
        return jax.vjp(lambda params: loss(params, batch, key), params)[1]

    shapes = jax.eval_shape(kept, params, batch, jax.random.key(0))
    return tree.nbytes(shapes) - tree.nbytes(params)


def start(
    config: Config, machine: engine.Engine, params: Params, blocks: Blocks | None = None
) -> engine.RunState:
    """The state before round 0; with slots its `clients` are NumPy arrays."""
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    here = blocks is None or blocks.slots is None
    # A seed is written down, guessed, and used again: two runs with one noise have a difference without any.
    noise = hosts.secret_key() if machine.aggregator.private else ()
    state = engine.init(
        machine.strategy, params, key, config.clients, machine.mesh, remember=here, noise=noise
    )
    return state if here else state._replace(clients=on_host(machine, params, config.clients))


def on_host(machine: engine.Engine, params: Params, clients: int) -> Tree:
    """The first memories of all clients, rows `[N, ...]` of NumPy arrays."""
    make = jax.jit(partial(engine.memories, machine.strategy))
    shapes = jax.eval_shape(make, params, jnp.arange(AT_A_TIME))
    store = jax.tree.map(lambda x: np.empty((clients, *x.shape[1:]), x.dtype), shapes)
    for first in range(0, clients, AT_A_TIME):
        ids = np.arange(first, first + AT_A_TIME, dtype=np.int32)
        keep(store, ids[ids < clients], hosts.fetch(make(params, ids)))
    return store


def keep(store: Tree, ids: np.ndarray, rows: Tree) -> None:
    """Writes clients' rows, of which there may be more, into a store."""

    def write(kept, new):
        kept[ids] = new[: len(ids)]

    jax.tree.map(write, store, rows)


def slotted(plan: Plan, clients: int) -> tuple[np.ndarray, Plan]:
    """The clients of a plan, one slot each, and the plan with their slots."""
    ids = np.unique(plan.ids)
    ids = ids[ids < clients]
    return ids, plan._replace(slots=np.searchsorted(ids, plan.ids).astype(np.int32))


def advance(
    program: Any, machine: engine.Engine, state: engine.RunState, plan: Plan, count: int, blocks: Blocks
) -> tuple[engine.RunState, dict[str, Array]]:
    """Runs a block. What the host keeps of `state` is written in place: it is the new state's, too.

    Args:
      program: of the run, see `Engine.rounds`.
      machine: its engine.
      state: before the block.
      plan: of the block.
      count: its rounds.
      blocks: how the run is cut.
    """
    train, plan = load(machine, plan, blocks)
    if blocks.slots is None:
        return engine.run(program, state, train, plan, count)
    store = state.clients
    ids, plan = slotted(plan, machine.num_clients)
    lent = lend(machine, state, np.resize(ids, blocks.slots))
    state, metrics = engine.run(program, state._replace(clients=lent), train, plan, count)
    keep(store, ids, hosts.fetch(state.clients))
    return state._replace(clients=store), metrics


def lend(machine: engine.Engine, state: engine.RunState, slots: np.ndarray) -> Tree:
    """The memories of some clients on the devices, of a state whose memories the host keeps.

    Args:
      machine: the engine.
      state: of the run.
      slots: `[S]`, the client of each slot.
    """
    if machine.mesh is None:
        return jax.tree.map(lambda x: x[slots], state.clients)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(slots), *x.shape[1:]), x.dtype), state.clients)
    places = engine.shardings(machine.strategy, state._replace(clients=shapes), machine.mesh).clients
    return jax.tree.map(lambda x, where: placement.rows(x, slots, where), state.clients, places)


def load(machine: engine.Engine, plan: Plan, blocks: Blocks) -> tuple[engine.Data, Plan]:
    """The training data of a block on the devices, and the plan with the rows that its samples have there.

    Samples that travel go to the devices that train their client; no other process gathers them.
    """
    if not machine.streams:
        return machine.train, plan
    rounds, clients, *batches = plan.samples.shape
    rows = np.zeros((rounds, clients, blocks.samples), np.int32)
    samples = np.zeros_like(plan.samples)
    for r, c in np.ndindex(rounds, clients):
        own, place = np.unique(plan.samples[r, c], return_inverse=True)
        rows[r, c, : len(own)], samples[r, c] = own, place.reshape(batches)
    rows = rows.reshape(rounds, -1, machine.chunk, blocks.samples)
    where = placement.along(machine.mesh, 2)
    own = {name: placement.rows(x, rows, where) for name, x in machine.train.items()}
    return own, plan._replace(samples=samples)
