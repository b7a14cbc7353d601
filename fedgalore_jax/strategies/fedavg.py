"""FedAvg: clients train weights in full, with AdamW or SGD, and the server averages them.

McMahan et al., 1602.05629; AdamW clients [M].

Ledger (m x n kernel, floats per client and round)
  trained         adapt and train leaves, in full
  frozen          freeze leaves
  down            mn (+ 2mn with moments=mean)
  up              mn (+ 2mn with moments=mean)
  kept by client  nothing (2mn with moments=keep)
  re-initialised  with moments=reset: both moments, every round
"""

import jax.numpy as jnp
import optax

from fedgalore_jax import tree
from fedgalore_jax.optimizer import WarmAdamState, adam_state, with_state
from fedgalore_jax.strategies.base import (
    Cohort,
    Common,
    Download,
    Local,
    ServerState,
    Strategy,
    Upload,
    add,
    change,
    require,
)

MOMENTS = ("reset", "keep", "mean")


def fedavg(
    common: Common,
    tx: optax.GradientTransformationExtraArgs | None = None,
    *,
    client: str = "adamw",
    moments: str = "reset",
    server_lr: float = 1.0,
) -> Strategy:
    """Builds FedAvg.

    Args:
      common: options shared by all strategies.
      tx: the local step of a method that edits this one, in place of `client`.
      client: the clients' optimizer, "adamw" or "sgd".
      moments: "reset" starts Adam afresh every round (Local Adaptivity in FL, 2106.02305 [V2]); "keep"
        leaves both moments with each client, stale when it is rarely sampled [I]; "mean" averages both
        moments like weights [I].
      server_lr: eta_g, the step along the mean change.

    Returns:
      A `Strategy` whose server keeps a `ServerState`; with moments=mean its `extra` is the averaged
      `WarmAdamState`, otherwise `()`.
    """
    require("moments", moments, moments in MOMENTS, f"one of {', '.join(MOMENTS)}")
    require("server_lr", server_lr, 0 < server_lr < float("inf"), "a positive, finite number")
    require("client", client, moments == "reset" or client == "adamw", f"adamw: moments={moments} needs them")
    tx = tx or common.optimizer(client)

    def init(params, key, num_clients):
        del key, num_clients
        adapt, train, freeze = common.split(tree.flatten(params))
        trainable = adapt | train
        adam = adam_state(tx.init(trainable)) if moments == "mean" else ()
        return ServerState(trainable, freeze, adam, jnp.zeros((), jnp.int32))

    def client_init(params, id):
        del id
        return adam_state(tx.init(common.trained(params))) if moments == "keep" else ()

    def broadcast(state):
        return Download(*state)

    def assemble(download, trainable, extra):
        del extra
        return tree.unflatten(download.frozen | trainable)

    def start(download, client_state, ops):
        del ops
        opt = tx.init(download.trainable)
        if moments != "reset":
            opt = with_state(opt, download.extra if moments == "mean" else client_state)
        return Local(download.trainable, opt, ())

    def finish(download, local, client_state, ops):
        del ops
        sent = {"change": change(download, local)}
        if moments == "mean":
            adam = adam_state(local.opt)
            sent |= {"mu": adam.mu, "nu": adam.nu}
        return Upload(mean=sent), adam_state(local.opt) if moments == "keep" else client_state

    def aggregate(state: ServerState, upload: Upload, cohort: Cohort):
        mean, adam = upload.mean, state.extra
        step = {path: server_lr * leaf for path, leaf in mean["change"].items()}
        if moments == "mean":
            count = adam.count_v + cohort.steps
            adam = WarmAdamState(count, count, mean["mu"], mean["nu"])
        return ServerState(add(state.trainable, step), state.frozen, adam, state.round + 1), {}

    def export(state, client_state=None):
        del client_state
        return tree.unflatten(state.frozen | state.trainable)

    def wire_down(download):
        if moments != "mean":
            return download.trainable
        return download.trainable, download.extra.mu, download.extra.nu

    return Strategy(
        init, broadcast, assemble, start, finish, aggregate, export, tx, client_init, wire_down=wire_down
    )
