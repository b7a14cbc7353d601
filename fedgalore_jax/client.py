"""What one client does in a round: K local steps on its own batches. The engine vmaps it over clients."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fedgalore_jax.strategies.base import Download, Ops, Strategy, Upload
from fedgalore_jax.types import Array, Batch, Params, Tree

Loss = Callable[[Params, Batch, Array], Array]
"""`(params, batch, dropout key) -> scalar`, the mean loss over the batch's real samples."""


def local_train(
    strategy: Strategy,
    loss: Loss,
    steps: int,
    download: Download,
    client_state: Tree,
    batch: Callable[[Array], Batch],
    client: Array,
    key: Array,
) -> tuple[Upload, Tree, Array]:
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
      key: of this client in this round.

    Returns:
      `(upload, client_state, losses [K])`.
    """
    dropout, own = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)

    def objective(tree, assemble, j):
        return loss(assemble(tree), batch(j), jax.random.fold_in(dropout, j))

    def gradient(assemble, tree, j):
        if j >= steps:
            raise ValueError(f"batch {j} of a client with {steps} local steps: ask for fewer batches")
        return jax.grad(objective)(tree, assemble, j)

    ops = Ops(client, own, gradient)
    local = strategy.start(download, client_state, ops)

    def assemble(trainable):
        return strategy.assemble(download, trainable, local.extra)

    def step(carry, j):
        trainable, opt = carry
        value, grads = jax.value_and_grad(objective)(trainable, assemble, j)
        updates, opt = strategy.tx.update(
            grads, opt, trainable, extra=local.extra, step=download.round * steps + j
        )
        return (optax.apply_updates(trainable, updates), opt), value

    (trainable, opt), losses = jax.lax.scan(
        step, (local.trainable, local.opt), jnp.arange(steps, dtype=jnp.int32)
    )
    local = local._replace(trainable=trainable, opt=opt)
    upload, client_state = strategy.finish(download, local, client_state, ops)
    return upload, client_state, losses
