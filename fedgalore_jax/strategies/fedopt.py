"""FedOpt: the server takes the mean change of its clients for a gradient (FedAvgM, -Adam, -Yogi, -Adagrad).

Reddi et al., 2003.00295 [M]; FedAvgM is Hsu et al., 1909.06335 [M]. None of them corrects the bias of its
moments, and tau is added to the root: `optax.adam` would be another method.

Ledger (m x n kernel, floats per client and round)
  trained         adapt and train leaves, in full
  frozen          freeze leaves
  down            mn
  up              mn
  kept by client  nothing (the server keeps 2mn)
  re-initialised  client=adamw: both moments of the client, every round
"""

import math

import jax
import jax.numpy as jnp

from fedgalore_jax.strategies.base import Common, Strategy, require
from fedgalore_jax.strategies.fedavg import fedavg

SERVERS = ("avgm", "adam", "yogi", "adagrad")


def fedopt(
    common: Common,
    *,
    server: str = "adam",
    server_lr: float | None = None,
    beta1: float | None = None,
    beta2: float | None = None,
    tau: float | None = None,
    client: str = "sgd",
) -> Strategy:
    """Builds FedOpt.

    Args:
      common: options shared by all strategies.
      server: "avgm", "adam", "yogi" or "adagrad".
      server_lr: eta_g; by default 1 for avgm and 0.01 for the others [I].
      beta1: decay of the first moment; by default 0 for adagrad and 0.9 for the others [M].
      beta2: decay of the second moment of adam and yogi; 0.99 by default [M].
      tau: adaptivity of all but avgm; the second moment starts at its square; 1e-3 by default [M].
      client: the clients' optimizer, "sgd" or "adamw".

    Returns:
      A `Strategy`; `ServerState.extra` holds both moments.
    """
    require("server", server, server in SERVERS, f"one of {', '.join(SERVERS)}")
    for name, value, users in (("beta2", beta2, ("adam", "yogi")), ("tau", tau, SERVERS[1:])):
        fits = value is None or server in users
        require(name, value, fits, f"a server among {', '.join(users)}: {server} has none")
    beta2, tau = 0.99 if beta2 is None else beta2, 1e-3 if tau is None else tau
    if server_lr is None:
        server_lr = 1.0 if server == "avgm" else 0.01
    if beta1 is None:
        beta1 = 0.0 if server == "adagrad" else 0.9
    require("server_lr", server_lr, 0 < server_lr < math.inf, "a positive, finite number")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        require(name, beta, 0 <= beta < 1, "a number in [0, 1)")
    require("tau", tau, 0 < tau < math.inf, "a positive, finite number")
    base = fedavg(common, common.optimizer(client), server_lr=server_lr)

    def init(params, key, num_clients):
        state = base.init(params, key, num_clients)
        first = jax.tree.map(jnp.zeros_like, state.trainable)
        second = jax.tree.map(lambda x: jnp.full_like(x, tau**2), state.trainable)
        return state._replace(extra={"first": first} | ({} if server == "avgm" else {"second": second}))

    def moment(v, d):
        square = d**2
        if server == "adagrad":
            return v + square
        if server == "yogi":
            return v - (1 - beta2) * square * jnp.sign(v - square)
        return beta2 * v + (1 - beta2) * square

    def aggregate(state, upload, cohort):
        change = upload.mean["change"]
        share = 1.0 if server == "avgm" else 1 - beta1
        step = first = jax.tree.map(lambda m, d: beta1 * m + share * d, state.extra["first"], change)
        extra = {"first": first}
        if server != "avgm":
            extra["second"] = jax.tree.map(moment, state.extra["second"], change)
            step = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + tau), first, extra["second"])
        state, metrics = base.aggregate(state, upload._replace(mean={"change": step}), cohort)
        return state._replace(extra=extra), metrics

    return base._replace(init=init, aggregate=aggregate)
