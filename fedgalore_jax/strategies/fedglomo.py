"""FedGLOMO: variance-reduced momentum on the clients and, across rounds, on the server.

Das et al., 2012.04061 [M]. Local steps follow the recursive estimate v = g(w; B) + v_last - g(w_last; B),
both gradients on the same batch, and run twice on the same batches: from w_k and from w_(k-1). With d and d'
the two mean changes, the server's step is u = beta d + (1 - beta)(u_last + d - d'), and u = d in the first
round that anyone comes through [I].
The paper's quantiser is left out; clipping, where it is on, acts on v [I].

Ledger (m x n kernel, floats per client and round)
  trained         adapt and train leaves, in full
  frozen          freeze leaves
  down            2mn (w_k, w_(k-1))
  up              2mn (both changes)
  kept by client  nothing
  re-initialised  the local estimate, every round
Four gradients per local step.
"""

import jax
import jax.numpy as jnp

from fedgalore_jax.corrections import storm
from fedgalore_jax.strategies.base import Common, Local, Strategy, change, require
from fedgalore_jax.strategies.fedavg import fedavg


def fedglomo(common: Common, *, beta: float = 0.2) -> Strategy:
    """Builds FedGLOMO.

    Args:
      common: options shared by all strategies.
      beta: weight of the fresh change against the corrected momentum [I].

    Returns:
      A `Strategy`; `ServerState.extra` is `{"previous": w_(k-1), "step": u, "begun": whether there is one}`.
    """
    require("beta", beta, 0 < beta <= 1, "a number in (0, 1]")
    tx = common.optimizer("sgd", storm())
    base = fedavg(common, tx)

    def init(params, key, num_clients):
        state = base.init(params, key, num_clients)
        step = jax.tree.map(jnp.zeros_like, state.trainable)
        return state._replace(extra={"previous": state.trainable, "step": step, "begun": jnp.zeros(())})

    def finish(download, local, client_state, ops):
        upload, memory = base.finish(download, local, client_state, ops)
        previous = download._replace(trainable=download.extra["previous"])
        again = ops.train(Local(previous.trainable, tx.init(previous.trainable), ()), tx)
        return upload._replace(mean=upload.mean | {"before": change(previous, again)}), memory

    def aggregate(state, upload, cohort):
        fresh = jnp.where(state.extra["begun"], beta, 1.0)

        def momentum(u, d, before):
            share = fresh.astype(d.dtype)
            return share * d + (1 - share) * (u + d - before)

        mean = upload.mean
        step = jax.tree.map(momentum, state.extra["step"], mean["change"], mean["before"])
        extra = {"previous": state.trainable, "step": step, "begun": jnp.ones(())}
        state, metrics = base.aggregate(state, upload._replace(mean={"change": step}), cohort)
        return state._replace(extra=extra), metrics

    return base._replace(
        init=init,
        finish=finish,
        aggregate=aggregate,
        wire_down=lambda download: (download.trainable, download.extra["previous"]),
    )
