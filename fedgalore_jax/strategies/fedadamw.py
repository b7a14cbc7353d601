"""FedAdamW: clients share block-wise means of Adam's second moment and a global direction.

2510.27486 [V2]: m starts at 0 and is corrected by the local step, v starts at the server's block means and is
corrected by the global step; a local step adds alpha times the mean change of the last round, over K. The
blocks follow the Hessian's structure (a head, a neuron) [M]; what we take for a block is an option [I]. (The
authors' code averages all of v [V], as `fedavg` with moments=mean does.)

Ledger (m x n kernel, floats per client and round)
  trained         adapt and train leaves, in full
  frozen          freeze leaves
  down            2mn (weights, last change) + n (block=neuron) or 1 (block=tensor)
  up              mn + n or 1
  kept by client  nothing
  re-initialised  the first moment, every round
"""

import math

import jax
import jax.numpy as jnp
import optax

from fedgalore_jax.corrections import add_extra
from fedgalore_jax.optimizer import WarmAdamState, adam_state, with_state
from fedgalore_jax.strategies.base import Common, Strategy, require
from fedgalore_jax.strategies.fedavg import fedavg

BLOCKS = ("neuron", "tensor")


def fedadamw(common: Common, *, alpha: float = 0.5, block: str = "neuron") -> Strategy:
    """Builds FedAdamW.

    Args:
      common: options shared by all strategies.
      alpha: weight of the last mean change in a local step; 0.5 in the authors' code [V].
      block: what shares one second moment: "neuron" (one output of a kernel, or a vector) or "tensor" (a
        kernel of one layer, or a vector).

    Returns:
      A `Strategy`; `ServerState.extra` is `{"nu": block means, "offset": change / K, "count": steps}`.
    """
    require("alpha", alpha, 0 <= alpha < math.inf, "a finite number >= 0")
    require("block", block, block in BLOCKS, f"one of {', '.join(BLOCKS)}")
    base = fedavg(common, optax.chain(common.adamw(), add_extra("offset", alpha)))

    def block_means(nu):
        def one(path, v):
            if path.rsplit("/")[-1] == "kernel":
                return v.mean(-2 if block == "neuron" else (-2, -1), keepdims=True)
            return v.mean(-1, keepdims=True)

        return {path: one(path, v) for path, v in nu.items()}

    def init(params, key, num_clients):
        state = base.init(params, key, num_clients)
        zeros = jax.tree.map(jnp.zeros_like, state.trainable)
        extra = {"nu": block_means(zeros), "offset": zeros, "count": jnp.zeros((), jnp.int32)}
        return state._replace(extra=extra)

    def start(download, client_state, ops):
        local, extra = base.start(download, client_state, ops), download.extra
        fresh = adam_state(local.opt)
        nu = jax.tree.map(lambda v, like: jnp.broadcast_to(v, like.shape), extra["nu"], fresh.nu)
        warm = WarmAdamState(fresh.count_m, extra["count"], fresh.mu, nu)
        return local._replace(opt=with_state(local.opt, warm), extra={"offset": extra["offset"]})

    def finish(download, local, client_state, ops):
        upload, memory = base.finish(download, local, client_state, ops)
        return upload._replace(mean=upload.mean | {"nu": block_means(adam_state(local.opt).nu)}), memory

    def aggregate(state, upload, cohort):
        count = state.extra["count"] + cohort.steps
        offset = jax.tree.map(lambda d: d / cohort.steps, upload.mean["change"])
        state, metrics = base.aggregate(state, upload, cohort)
        return state._replace(extra={"nu": upload.mean["nu"], "offset": offset, "count": count}), metrics

    return base._replace(
        init=init,
        start=start,
        finish=finish,
        aggregate=aggregate,
        wire_down=lambda download: (download.trainable, download.extra["nu"], download.extra["offset"]),
    )
