"""FLoRA: clients' factors are stacked, which averages their products exactly, and merged into the base.

Wang et al., 2409.05976, and the authors' code [V]: fresh factors every round, weights on the products. Every
client gets the whole stack, which grows with the cohort: beyond mn / (r (m + n)) clients it is larger than
the kernel. The server holds one stack and one product at a time.

Ledger (m x n kernel, C clients in the round, floats per client and round)
  trained         fresh A and B of every adapt kernel; train leaves in full
  frozen          the merged base during the round, freeze leaves
  down            C r(m + n); a client that missed a round needs that round's stack as well
  up              r(m + n)
  kept by client  the merged base
  re-initialised  A, B and both moments, every round
With different ranks, r is the client's own (their mean in the stack).
The server sees every client's factors (lane `stack`): not for secure aggregation.
"""

import jax
import jax.numpy as jnp

from fedgalore_jax import tree
from fedgalore_jax.strategies.base import Common, Local, Strategy, Upload
from fedgalore_jax.strategies.fedit import fedit
from fedgalore_jax.strategies.lora import (
    at_rank,
    by_rank,
    factors_of,
    fresh_factors,
    product,
    scale_of,
    stacked,
    wire_of,
    with_adapters,
)
from fedgalore_jax.types import LoRA


def flora(common: Common, *, client: str = "adamw") -> Strategy:
    """Builds FLoRA.

    Args:
      common: options shared by all strategies; `ranks` may differ.
      client: the clients' optimizer, "adamw" or "sgd".

    Returns:
      A `Strategy`; `ServerState.trainable` holds the plainly trained leaves alone.
    """
    base = fedit(common, client=client)

    def init(params, key, num_clients):
        state = base.init(params, key, num_clients)
        return state._replace(trainable=factors_of(state.trainable)[1])

    def assemble(download, trainable, extra):
        return with_adapters(download.frozen, trainable, extra["scale"])

    def start(download, client_state, ops):
        del client_state
        rank = common.rank_of(ops.id)
        kernels, _, _ = common.split(download.frozen | download.trainable)
        factors = at_rank(fresh_factors(kernels, ops.key, common.rank), rank)
        trainable = factors | download.trainable
        return Local(trainable, base.tx.init(trainable), {"scale": scale_of(common, rank)})

    def finish(download, local, client_state, ops):
        del ops
        factors, head = factors_of(local.trainable)
        change = jax.tree.map(jnp.subtract, head, download.trainable)
        scale = local.extra["scale"]
        stack = {path: LoRA(x.a, scale.astype(x.b.dtype) * x.b) for path, x in factors.items()}
        return Upload(mean={"change": change}, stack=stack), client_state

    def aggregate(state, upload, cohort):
        state, metrics = base.aggregate(state, upload, cohort)
        frozen = dict(state.frozen)
        for path, rows in upload.stack.items():
            wide = stacked(rows, cohort.weights)
            frozen[path] = frozen[path] + product(wide.a, wide.b).astype(frozen[path].dtype)
        return state._replace(frozen=frozen), metrics

    def relay(stack):
        """Every row; where ranks differ, those of clients 0, 1, ...: others differ by less than a cycle."""
        if common.ranks is None:
            return stack
        clients = len(jax.tree.leaves(stack)[0])
        rows = [jax.tree.map(lambda x, c=c: x[c], stack) for c in range(clients)]
        return [by_rank(common, row)[c % wire_of(common)] for c, row in enumerate(rows)]

    return base._replace(
        init=init,
        assemble=assemble,
        start=start,
        finish=finish,
        aggregate=aggregate,
        export=lambda state, client_state=None: tree.unflatten(state.frozen | state.trainable),
        wire_down=lambda download: [download.trainable] * wire_of(common),
        wire_up=lambda upload: by_rank(common, upload),
        wire_of=wire_of(common),
        relay=relay,
        comparable=False,
        adapter=None,
    )
