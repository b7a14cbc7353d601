"""FedLADA: local adaptive steps, amended by the last round's global change.

Sun et al., 2308.00522 [V2]; the update is a third-party port's [V], its symbols [M]:
w <- w - eta (1 - gamma) m / (sqrt(v) + eps) + (gamma / K) D, with D the mean change of the last round,
without bias correction; m starts at 0 every round, v is the mean of the clients'. The paper's own rule for v
(a running maximum with a lower bound [M]) was not read. The amendment has the
learning rate that D was made with [I].

Ledger (m x n kernel, floats per client and round)
  trained         adapt and train leaves, in full
  frozen          freeze leaves
  down            3mn (weights, v, D)
  up              2mn (change, v)
  kept by client  nothing
  re-initialised  the first moment, every round
"""

import jax
import jax.numpy as jnp
import optax

from fedgalore_jax.corrections import add_extra
from fedgalore_jax.optimizer import WarmAdamState, adam_state, with_state
from fedgalore_jax.strategies.base import Common, Strategy, require
from fedgalore_jax.strategies.fedavg import fedavg

_LONG_AGO = 2**30  # a step count at which bias correction divides by 1


def fedlada(common: Common, *, gamma: float = 0.9, server_lr: float = 1.0) -> Strategy:
    """Builds FedLADA.

    Args:
      common: options shared by all strategies.
      gamma: share of the global change in a local step; 0.9 in the port [V].
      server_lr: eta_g, the step along the mean change.

    Returns:
      A `Strategy`; `ServerState.extra` is `{"nu": v, "offset": D / K}`.
    """
    require("gamma", gamma, 0 <= gamma < 1, "a number in [0, 1)")
    tx = optax.chain(common.clipped_adam(), optax.scale(1 - gamma), common.tail(), add_extra("offset", gamma))
    base = fedavg(common, tx, server_lr=server_lr)

    def init(params, key, num_clients):
        state = base.init(params, key, num_clients)
        zeros = jax.tree.map(jnp.zeros_like, state.trainable)
        return state._replace(extra={"nu": zeros, "offset": zeros})

    def start(download, client_state, ops):
        local = base.start(download, client_state, ops)
        zeros = adam_state(local.opt).mu
        count = jnp.full((), _LONG_AGO, jnp.int32)
        warm = WarmAdamState(count, count, zeros, download.extra["nu"])
        return local._replace(opt=with_state(local.opt, warm), extra={"offset": download.extra["offset"]})

    def finish(download, local, client_state, ops):
        upload, memory = base.finish(download, local, client_state, ops)
        return upload._replace(mean=upload.mean | {"nu": adam_state(local.opt).nu}), memory

    def aggregate(state, upload, cohort):
        state, metrics = base.aggregate(state, upload, cohort)
        offset = jax.tree.map(lambda d: d / cohort.steps, upload.mean["change"])
        return state._replace(extra={"nu": upload.mean["nu"], "offset": offset}), metrics

    return base._replace(
        init=init,
        start=start,
        finish=finish,
        aggregate=aggregate,
        wire_down=lambda download: (download.trainable, download.extra),
    )
