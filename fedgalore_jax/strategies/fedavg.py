"""FedAvg: clients train weights in full with AdamW, the server averages them.

McMahan et al., 1602.05629; AdamW clients [M].

Ledger (m x n kernel, floats per client and round)
  trained         adapt and train leaves, in full
  frozen          freeze leaves
  down            mn (+ 2mn with moments=mean)
  up              mn (+ 2mn with moments=mean)
  kept by client  nothing
  re-initialised  with moments=reset: both moments, every round
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp

from fedgalore_jax import tree
from fedgalore_jax.optimizer import WarmAdamState, adam_state, with_adam_state
from fedgalore_jax.strategies.base import (
    Cohort,
    Common,
    Download,
    Local,
    Strategy,
    Upload,
    add,
    change,
)
from fedgalore_jax.types import Array, Flat

MOMENTS = ("reset", "mean")


class FedAvgState(NamedTuple):
    """The server's memory.

    Attributes:
      trainable, frozen: `{path: leaf}`, together the model.
      moments: the averaged `WarmAdamState`, or `()` when moments are reset.
      round: int32 scalar.
    """

    trainable: Flat
    frozen: Flat
    moments: Any
    round: Array


def fedavg(common: Common, *, moments: str = "reset", server_lr: float = 1.0) -> Strategy:
    """Builds FedAvg.

    Args:
      common: options shared by all strategies.
      moments: "reset" starts Adam afresh every round (Local Adaptivity in FL, 2106.02305 [V2]); "mean"
        averages both moments like weights [I].
      server_lr: eta_g, the step along the mean change.

    Returns:
      A `Strategy`.
    """
    if moments not in MOMENTS:
        raise ValueError(f"moments={moments!r} is not one of {', '.join(MOMENTS)}")
    if not 0 < server_lr < math.inf:
        raise ValueError(f"server_lr={server_lr} is not usable: give a positive, finite number")
    tx = common.adamw()

    def init(params, key, num_clients):
        del key, num_clients
        adapt, train, freeze = common.split(tree.flatten(params))
        trainable = adapt | train
        opt = adam_state(tx.init(trainable)) if moments == "mean" else ()
        return FedAvgState(trainable, freeze, opt, jnp.zeros((), jnp.int32))

    def broadcast(state):
        return Download(state.trainable, state.frozen, state.moments, state.round)

    def assemble(download, trainable, extra):
        del extra
        return tree.unflatten(download.frozen | trainable)

    def start(download, client_state, ops):
        del client_state, ops
        opt = tx.init(download.trainable)
        if moments == "mean":
            opt = with_adam_state(opt, download.extra)
        return Local(download.trainable, opt, ())

    def finish(download, local, client_state, ops):
        del ops
        adam = adam_state(local.opt)
        sent = {"change": change(download, local)}
        if moments == "mean":
            sent |= {"mu": adam.mu, "nu": adam.nu}
        return Upload(mean=sent), client_state

    def aggregate(state: FedAvgState, upload: Upload, cohort: Cohort):
        mean = upload.mean
        step = {path: server_lr * leaf for path, leaf in mean["change"].items()}
        adam = state.moments
        if moments == "mean":
            count = adam.count_v + cohort.steps
            adam = WarmAdamState(count, count, mean["mu"], mean["nu"])
        return FedAvgState(add(state.trainable, step), state.frozen, adam, state.round + 1), {}

    def export(state):
        return tree.unflatten(state.frozen | state.trainable)

    def wire_down(download):
        if moments == "reset":
            return download.trainable
        return download.trainable, download.extra.mu, download.extra.nu

    return Strategy(init, broadcast, assemble, start, finish, aggregate, export, tx, wire_down=wire_down)
