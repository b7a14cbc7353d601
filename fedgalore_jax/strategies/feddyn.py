"""FedDyn: a dynamic regulariser that makes the clients' optima agree with the global one.

Acar et al., 2111.04263, in FL-Simulator's form [V]: clients add lam (w - w_t + h_i) to the gradient, then
h_i += w_i - w_t; the server adds the mean of h over *all* clients to the mean of the weights. (The paper's h
is -lam times this one.) Both means are by sample counts, as the objective is; there clients weigh alike [I].
h_i of a rarely seen client is stale, and with Adam clients small lam is unstable [M].

Ledger (m x n kernel, floats per client and round)
  trained         adapt and train leaves, in full
  frozen          freeze leaves
  down            mn
  up              mn
  kept by client  mn (h_i)
  re-initialised  client=adamw: both moments, every round
"""

import math

import jax
import jax.numpy as jnp
import optax

from fedgalore_jax.corrections import add_extra, proximal
from fedgalore_jax.strategies.base import Common, Strategy, add, require, scaled
from fedgalore_jax.strategies.fedavg import fedavg


def feddyn(
    common: Common,
    *first: optax.GradientTransformation,
    lam: float = 0.1,
    client: str = "sgd",
) -> Strategy:
    """Builds FedDyn.

    Args:
      common: options shared by all strategies.
      *first: corrections of the gradient ahead of this one, for a method that edits it.
      lam: strength of the regulariser.
      client: the clients' optimizer, "sgd" or "adamw".

    Returns:
      A `Strategy`; `ServerState.extra["h"]` is the mean of all h_i, a client's memory `{"h": h_i}`.
    """
    require("lam", lam, 0 < lam < math.inf, "a positive, finite number")
    base = fedavg(common, common.optimizer(client, *first, proximal(lam), add_extra("h", lam)))

    def init(params, key, num_clients):
        state = base.init(params, key, num_clients)
        return state._replace(extra={"h": jax.tree.map(jnp.zeros_like, state.trainable)})

    def client_init(params, id):
        del id
        return {"h": jax.tree.map(jnp.zeros_like, common.trained(params))}

    def start(download, client_state, ops):
        return base.start(download, client_state, ops)._replace(extra={"h": client_state["h"]})

    def finish(download, local, client_state, ops):
        upload, _ = base.finish(download, local, (), ops)
        change = upload.mean["change"]
        mine = {"change": scaled(change, ops.share)}
        return upload._replace(sum=mine), {"h": add(client_state["h"], change)}

    def aggregate(state, upload, cohort):
        h = add(state.extra["h"], upload.sum["change"])
        step = add(upload.mean["change"], h)
        state, metrics = base.aggregate(state, upload._replace(mean={"change": step}), cohort)
        return state._replace(extra=state.extra | {"h": h}), metrics

    # The mean over the round and the one over everyone are of one message.
    return base._replace(
        init=init,
        client_init=client_init,
        start=start,
        finish=finish,
        aggregate=aggregate,
        wire_up=lambda upload: upload._replace(sum=upload.sum | {"change": ()}),
    )
