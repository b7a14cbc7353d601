"""Rounds: broadcast, vmapped local training in chunks, reduction, aggregation.

The engine knows no strategy by name. Rounds up to the next evaluation are one compiled call with a traced
trip count: the same program runs one round or fifty.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedgalore_jax import placement, tree
from fedgalore_jax.aggregators import MEAN, Aggregator
from fedgalore_jax.client import Loss, local_train
from fedgalore_jax.data import Plan, Rows, Split
from fedgalore_jax.strategies.base import Cohort, Strategy
from fedgalore_jax.types import Array, Batch, Params, Tree

Data = Mapping[str, Array | Rows]
"""Inputs and labels of samples: on the devices, or the host's."""


class RunState(NamedTuple):
    """All that a run carries from round to round.

    Attributes:
      server: the strategy's state.
      clients: memories of all clients, rows `[N, ...]`; inside of a block with slots, a row for each.
      last: `[N]` int32, the last round each client was sent; -1 before its first.
      key: the run's PRNG key; round t uses `fold_in(key, t)`.
      noise: PRNG key of what hides the clients of a private run, which nobody knows; `()` of any other.
    """

    server: Tree
    clients: Tree
    last: Array
    key: Array
    noise: Any = ()


class Wire(NamedTuple):
    """Costs of one client, measured from the pytrees and the traced round themselves.

    Attributes:
      down, up: bytes that travel each round.
      optimizer: state of the local optimizer.
      memory: what the client keeps between rounds.
      catch_up: what a client must be sent for each round that it missed (for all of them together, where
        the strategy says so), before it can take part again.
      gradients: gradient evaluations per local step.
    """

    down: int
    up: int
    optimizer: int
    memory: int
    catch_up: int
    gradients: float


def init(
    strategy: Strategy,
    params: Params,
    key: Array,
    num_clients: int,
    mesh: placement.Mesh | None = None,
    *,
    remember: bool = True,
    noise: Any = (),
) -> RunState:
    """The state before round 0. Weights are kept in float32 or wider, whatever they were stored in:
    changes of a round would be lost in half precision. `remember=False` leaves out the memories.

    What it takes from `params` as it is, it shares with them.
    """
    begin, wide = partial(_begin, strategy, num_clients, remember), tree.wide(params)
    args = (wide, jax.random.fold_in(key, 0), jax.random.fold_in(key, 1), noise)
    taken, shapes = _taken(begin, *args)
    places = shardings(strategy, shapes, mesh) if mesh else jax.tree.map(lambda x: None, shapes)
    weights = set(map(id, jax.tree.leaves(wide)))

    def there(x, place):
        """A weight that lies where the state's is to."""
        lies = getattr(x, "sharding", None)  # NumPy's arrays and traced ones lie nowhere
        if id(x) not in weights or lies is None:
            return None
        return x if place is None or place.is_equivalent_to(lies, x.ndim) else None

    taken = jax.tree.map(there, taken, places, is_leaf=lambda x: x is None)
    made = jax.jit(lambda *args: tree.without(taken, begin(*args)), out_shardings=tree.without(taken, places))
    return tree.joined(made(*args), taken)


def _begin(
    strategy: Strategy,
    num_clients: int,
    remember: bool,
    params: Params,
    server_key: Array,
    run_key: Array,
    noise: Any,
) -> RunState:
    server = strategy.init(params, server_key, num_clients)
    clients = memories(strategy, params, jnp.arange(num_clients)) if remember else ()
    return RunState(server, clients, jnp.full(num_clients, -1, jnp.int32), run_key, noise)


def frozen(strategy: Strategy, params: Params, num_clients: int, moved: RunState) -> Any:
    """Which leaves of a state are the model's own, before the first round and after the last.

    Args:
      strategy: the algorithm.
      params: the model's.
      num_clients: N.
      moved: what a program gives of a state, or its shapes; see `Engine.program`.

    Returns:
      A tree like the state, of those leaves of `params`, with None for all else.
    """
    wide, key = jax.eval_shape(tree.wide, params), jax.random.key(0)
    taken, _ = _taken(partial(_begin, strategy, num_clients, True), wide, key, key, moved.noise)
    own = {id(shape): leaf for shape, leaf in zip(*map(jax.tree.leaves, (wide, params)), strict=True)}
    return tree.without(moved, jax.tree.map(lambda x: own.get(id(x)), taken))


def memories(strategy: Strategy, params: Params, ids: Array) -> Tree:
    """The first memories of clients, a row for each."""
    return jax.vmap(partial(strategy.client_init, tree.wide(params)))(ids.astype(jnp.int32))


def shardings(strategy: Strategy, state: RunState, mesh: placement.Mesh) -> Any:
    """Where the arrays of a state lie on a mesh: a `RunState` of shardings."""
    weights = tree.flatten(jax.eval_shape(strategy.export, state.server))
    whole: Any = placement.whole(mesh)
    server, clients = (
        placement.of_server(mesh, state.server, weights),
        placement.of_clients(mesh, state.clients, weights),
    )
    return RunState(server, clients, whole, whole, jax.tree.map(lambda key: whole, state.noise))


class Engine(NamedTuple):
    """A strategy bound to a model, a training set and the shape of a round.

    Attributes:
      strategy: the algorithm.
      loss: of the model, `(params, batch, key) -> scalar`.
      train: the training set: on the devices, or, with `streams`, the host's, of which `rounds` is given each
        client's share of a block.
      num_clients: N.
      steps: K.
      chunk: clients trained at a time; C of every plan is a multiple of it.
      mesh: what a round is spread over, None for one device; `chunk` is a multiple of its clients axis.
      streams: whether the training data travel with each block, `[R, C / chunk, chunk, S, ...]`: S samples of
        each client, which `Plan.samples` then counts from 0.
      aggregator: how uploads become one.
    """

    strategy: Strategy
    loss: Loss
    train: Data
    num_clients: int
    steps: int
    chunk: int
    mesh: placement.Mesh | None = None
    streams: bool = False
    aggregator: Aggregator = MEAN

    def rounds(self) -> Callable[..., tuple[RunState, dict[str, Array]]]:
        """The program of a run, as a function: `rounds(state, train, plan, count) -> (state, metrics)`."""
        return partial(run, self.program())

    def program(self) -> Any:
        """The program of a run, jitted: `program(state, train, plan, count) -> (moved, metrics)`.

        It runs the first `count` rounds of the plan; metrics are rows `[R, ...]`, meaningful up to `count`.
        `moved` is the state after them with None for what every round hands on as it was given, such as
        frozen weights: of an output that is an input the program would make a copy. See `run`.
        """

        def rounds(state: RunState, train: Batch, plan: Plan, count: Array):
            def row(r):
                return jax.tree.map(lambda field: field[r], plan)

            def data(r):
                return {name: x[r] for name, x in train.items()} if self.streams else train

            def body(r, carry):
                moved, metrics = carry
                after, new = self.round(tree.joined(moved, state), data(r), row(r))
                metrics = jax.tree.map(lambda rows, x: rows.at[r].set(x), metrics, new)
                return tree.without(same, self.held(after)), metrics

            (taken, _), (_, shapes) = _taken(self.round, state, data(0), row(0))
            same = jax.tree.map(lambda had, got: had if got is had else None, state, taken)
            size = plan.ids.shape[0]
            empty = jax.tree.map(lambda x: jnp.zeros((size, *x.shape), x.dtype), shapes)
            moved, metrics = jax.lax.fori_loop(0, count, body, (tree.without(same, state), empty))
            return tree.without(same, self.held(tree.joined(moved, state))), placement.everywhere(metrics)

        def on_mesh(*args):
            with placement.on(self.mesh):
                return rounds(*args)

        return jax.jit(on_mesh)

    def held(self, state: RunState) -> RunState:
        """The traced state, where it lay before."""
        if self.mesh is None:
            return state
        return jax.lax.with_sharding_constraint(state, shardings(self.strategy, state, self.mesh))

    def round(self, state: RunState, train: Batch, plan: Plan) -> tuple[RunState, dict[str, Array]]:
        """One round; `plan`, and data that are streamed, have no round axis.

        A client whose upload, memory or loss is not finite is as good as absent. Where no one is left, the
        server stays as it was, and only the round's number moves.
        """
        strategy = self.strategy
        download = strategy.broadcast(state.server)
        key = jax.random.fold_in(state.key, download.round)
        counts, size = jnp.asarray(plan.counts), (plan.ids < self.num_clients).sum()
        mask = counts > 0
        weights = self.aggregator.weights(counts, size)
        whole = next(iter(self.train.values())).shape[0]
        shares = self.aggregator.shares(counts, whole, self.num_clients)
        memory = jax.tree.map(lambda x: x.take(plan.slots, 0, mode="clip"), state.clients)

        def client(memory, client_id, share, samples, weight, reach, own):
            def batch(j):
                return {name: x[samples[j]] for name, x in (own or train).items()} | {"weight": weight}

            client_key = jax.random.fold_in(key, client_id)
            args = (strategy, self.loss, self.steps, download, memory)
            trained = local_train(*args, batch, client_id, share, client_key, reach)
            left = trained.upload, trained.memory, trained.loss
            return *left, tree.all_finite(left)

        def train_chunk(chunk):
            (ids, share, samples, weight, reach, p, taking_part, memory), own = chunk
            upload, memory, losses, finite = jax.vmap(client)(memory, ids, share, samples, weight, reach, own)
            sound = taking_part & finite
            upload, losses = tree.keep_rows(sound, (upload, losses))
            reduced, rows = self.aggregator.arrive(upload, p, sound)
            return reduced, (rows, memory, losses, sound)

        def add_chunk(total, chunk):
            reduced, rows = train_chunk(chunk)
            return jax.tree.map(jnp.add, total, reduced), rows

        everyone = (plan.ids, shares, plan.samples, plan.weight, plan.steps, weights, mask, memory)
        chunks = jax.tree.map(lambda x: x.reshape(-1, self.chunk, *x.shape[1:]), everyone)
        chunks = placement.over_clients((chunks, train if self.streams else {}), 1)
        first = jax.tree.map(lambda x: x[0], chunks)
        shapes = jax.eval_shape(lambda c: train_chunk(c)[0], first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, (uploads, memory, losses, present) = jax.lax.scan(add_chunk, zeros, chunks)
        uploads, losses, present = jax.tree.map(
            lambda x: x.reshape(-1, *x.shape[2:]), (uploads, losses, present)
        )

        weights = self.aggregator.weights(jnp.where(present, counts, 0), size)
        noise = jax.random.fold_in(state.noise, download.round) if self.aggregator.private else None
        upload = self.aggregator.upload(total, uploads, counts, present, size, noise)
        steps = self.steps
        if plan.steps is not None:
            steps = jnp.maximum(jnp.round(weights @ plan.steps.astype(weights.dtype)), 1).astype(jnp.int32)
        cohort = Cohort(weights, present.astype(jnp.float32), self.num_clients, steps)
        server, metrics = strategy.aggregate(state.server, upload, cohort)
        if not self.aggregator.private:
            server = _where(present.any(), server, state.server)
        missed = self.catch_up(state, jnp.asarray(plan.ids), mask, download, upload.stack)
        loss = jnp.average(losses, weights=weights)  # NaN where no one is left
        metrics = {"train_loss": loss, "rejected": (mask & ~present).sum(), **metrics, **missed}
        slots = jnp.where(present, plan.slots, self.num_clients)
        slots = slots.reshape(-1, self.chunk)  # as memories come: joined chunks are no longer spread
        clients = jax.tree.map(lambda rows, new: rows.at[slots].set(new, mode="drop"), state.clients, memory)
        last = state.last.at[plan.ids].set(download.round, mode="drop")  # who is absent was sent the round
        return state._replace(server=server, clients=clients, last=last), metrics

    def catch_up(self, state: RunState, ids: Array, mask: Array, download, stack) -> dict[str, Array]:
        """Bytes that this round's clients, absent ones too, first need for the rounds they missed.

        Missed rounds are priced like this one. A client that missed many is sent the model instead.
        """
        strategy = self.strategy
        relayed = tree.nbytes(strategy.relay(stack)) / len(ids)
        sent = tree.nbytes(strategy.catch_up(download)) / strategy.wire_of
        if not relayed + sent:
            return {}
        # A float: that of a large model is past 32 bits.
        model = float(tree.nbytes(jax.eval_shape(strategy.export, state.server)))
        rounds = download.round - 1 - state.last.take(ids, mode="clip")
        if strategy.catch_up_once:
            rounds = jnp.minimum(rounds, 1)
        each = jnp.minimum(rounds * (relayed * mask.sum() + sent), model)
        return {"bytes_catch_up": ((ids < self.num_clients) * each).sum()}

    def wire(self, state: RunState, plan: Plan) -> Wire:
        """Measures what one client sends, receives, holds and computes, without computing anything."""
        strategy, gradients = self.strategy, []
        clients = int((np.asarray(plan.ids[0]) < self.num_clients).sum())

        def one(state, train, plan):
            download = strategy.broadcast(state.server)
            memory = jax.tree.map(lambda x: x[0], state.clients)

            def batch(j):
                rows = plan.samples[0, 0, j]
                return {name: x[rows] for name, x in train.items()} | {"weight": plan.weight[0, 0]}

            args = (strategy, self.loss, self.steps, download, memory, batch, plan.ids[0, 0])
            trained = local_train(*args, jnp.ones(()), state.key)
            gradients.append(trained.gradients)
            stack = jax.tree.map(lambda x: jnp.broadcast_to(x, (clients, *x.shape)), trained.upload.stack)
            relayed = strategy.relay(stack)
            down = strategy.wire_down(download), [relayed] * strategy.wire_of
            missed = strategy.catch_up(download), [relayed] * strategy.wire_of
            travels = down, strategy.wire_up(trained.upload), missed
            return *travels, trained.opt, trained.memory

        sizes = map(tree.nbytes, jax.eval_shape(one, state, self.train, plan))
        down, up, missed, optimizer, memory = sizes
        down, up, missed = (size // strategy.wire_of for size in (down, up, missed))
        return Wire(down, up, optimizer, memory, missed, gradients[0] / self.steps)


def _taken(function: Any, *args: Tree) -> tuple[Any, Any]:
    """What a function hands on as it was given.

    Returns:
      A tree like its output, of those leaves of `args`, with None for what it computes; and the shapes of
      its output.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    given = dict(zip(map(id, closed.jaxpr.invars), jax.tree.leaves(args), strict=True))
    found = [given.get(id(out)) for out in closed.jaxpr.outvars]
    return jax.tree.unflatten(jax.tree.structure(shapes), found), shapes


def run(
    program: Any, state: RunState, train: Data, plan: Plan, count: Array | int
) -> tuple[RunState, dict[str, Array]]:
    """Calls an `Engine.program`: the state after `count` rounds, and their metrics.

    What no round changes is in both states, and on the devices once.
    """
    moved, metrics = program(state, train, plan, count)
    return tree.joined(moved, state), metrics


def _where(moved: Array, new: Tree, old: Tree) -> Tree:
    """The server's new state, or the old one with the new round's number."""

    def one(path, new, old):
        name = getattr(path[-1], "name", getattr(path[-1], "key", ""))  # of a NamedTuple, or of a dict
        return new if name == "round" or new is old else jnp.where(moved, new, old)

    return jax.tree.map_with_path(one, new, old)


_ON_GPU = {
    # cuBLAS adds biases inside its products, and needs no tuning.
    "xla_gpu_enable_triton_gemm": False,
    # Products of one input stay apart: merged, their kernels are copied in every step, and their results.
    "xla_gpu_dot_merger_threshold_mb": 0,
}


def compiled(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """The program of rounds that were traced and lowered, with the options that suit the backend."""
    return lowered.compile(_ON_GPU if jax.default_backend() == "gpu" else None)


def on_device(split: Split, mesh: placement.Mesh | None = None, *, streams: bool = False) -> Data:
    """A split as the engine takes it: inputs and labels in one dict, of device arrays unless it streams."""
    if streams:
        return split.arrays
    everywhere = None if mesh is None else placement.whole(mesh)
    return {name: placement.put(np.asarray(x), everywhere) for name, x in split.arrays.items()}
