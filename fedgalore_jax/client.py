"""What one client does in a round: K local steps on its own batches. The engine vmaps it over clients."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedgalore_jax import placement
from fedgalore_jax.strategies.base import Download, Local, Ops, Strategy, Upload
from fedgalore_jax.types import Array, Batch, Params, Tree

Loss = Callable[[Params, Batch, Array], Array]
"""`(params, batch, dropout key) -> scalar`, the mean loss over the batch's real samples."""


class Trained(NamedTuple):
    """What a client leaves after a round.

    Attributes:
      upload: for the server.
      memory: its own, for its next round.
      loss: mean over the steps it did.
      opt: the last state of its optimizer.
      gradients: how many gradients it evaluated, a Python int: all of them are seen while tracing.
    """

    upload: Upload
    memory: Tree
    loss: Array
    opt: Tree
    gradients: int


def local_train(
    strategy: Strategy,
    loss: Loss,
    steps: int,
    download: Download,
    client_state: Tree,
    batch: Callable[[Array], Batch],
    client: Array,
    share: Array,
    key: Array,
    reach: Array | None = None,
) -> Trained:
    """Trains one client.

    The step counter comes from the scan and the round number, neither of which is batched over clients, so
    that what hangs on it (a refresh, a schedule) stays a branch under `vmap` (docs/design.md, F1).

    Args:
      strategy: the algorithm.
      loss: of the model.
      steps: K.
      download: from the server.
      client_state: this client's memory.
      batch: `batch(j)` is the batch of local step j.
      client: its id, int32 scalar.
      share: its samples as a share of all clients'.
      key: of this client in this round.
      reach: int32 scalar, how many of any K steps it gets to, at least one; None for all. What comes after
        them is computed and dropped, and counters are then batched.

    Returns:
      A `Trained`.
    """
    dropout, own = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
    gradients = 0

    def objective(tree, assemble, j):
        return loss(placement.as_weights(assemble(tree)), batch(j), jax.random.fold_in(dropout, j))

    def value_and_grad(assemble, tree, j):
        nonlocal gradients
        gradients += 1
        if j >= steps:
            raise ValueError(f"batch {j} of a client with {steps} local steps: ask for fewer batches")
        return jax.value_and_grad(objective)(tree, assemble, j)

    def train(local: Local, tx) -> tuple[Local, Array]:
        nonlocal gradients
        evaluations = 0

        def assemble(trainable):
            return strategy.assemble(download, trainable, local.extra)

        def step(carry, j, seen=None):
            nonlocal evaluations
            evaluations = 0 if seen else 1
            trainable, opt = carry
            value, grads = seen or jax.value_and_grad(objective)(trainable, assemble, j)

            def grad_fn(point):
                nonlocal evaluations
                evaluations += 1
                return jax.grad(objective)(point, assemble, j)

            updates, moved = tx.update(
                grads,
                opt,
                trainable,
                extra=local.extra,
                start=local.trainable,
                step=download.round * steps + j,
                grad_fn=grad_fn,
            )
            stepped = optax.apply_updates(trainable, updates), moved
            if reach is None:
                return stepped, value
            done = j < reach
            stepped = jax.tree.map(lambda new, old: jnp.where(done, new, old), stepped, carry)
            return stepped, jnp.where(done, value, 0)

        carry, losses = (local.trainable, local.opt), []
        if local.first:
            carry, value = step(carry, jnp.zeros((), jnp.int32), local.first)
            losses, gradients = [value[None]], gradients + evaluations
        later = jnp.arange(len(losses), steps, dtype=jnp.int32)
        (trainable, opt), values = jax.lax.scan(step, carry, later)
        gradients += len(later) * evaluations
        return Local(trainable, opt, local.extra), jnp.concatenate([*losses, values])

    ops = Ops(client, share, own, value_and_grad, lambda local, tx: train(local, tx)[0], steps)
    local, losses = train(strategy.start(download, client_state, ops), strategy.tx)
    upload, memory = strategy.finish(download, local, client_state, ops)
    _check_memory(client_state, memory)
    mean = losses.mean() if reach is None else losses.sum() / reach
    return Trained(upload, memory, mean, local.opt, gradients)


def _check_memory(made: Tree, left: Tree) -> None:
    """What a client leaves takes the place of what it had, and must not be cast or broadcast to it."""
    forms = [jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", memory) for memory in (made, left)]
    if forms[0] != forms[1]:
        raise ValueError(f"finish leaves a memory {forms[1]}: give one as client_init makes it, {forms[0]}")
