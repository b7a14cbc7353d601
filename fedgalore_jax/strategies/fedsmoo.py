"""FedSMOO: FedDyn with sharpness-aware clients whose perturbations are held to a consensus.

Sun et al., 2305.11584, as the authors' FL-Simulator simplifies it [V]: each local step takes its gradient at
w + e with e = rho d / |d|, d = g - mu_i - s, and mu_i += e - s; the server sets s to rho times the normalised
mean of mu_i, by sample counts as every mean here [I]. Norms are over everything that is trained.

Ledger (m x n kernel, floats per client and round)
  trained         adapt and train leaves, in full
  frozen          freeze leaves
  down            2mn (weights, s)
  up              2mn (change, mu_i)
  kept by client  2mn (h_i, mu_i)
  re-initialised  client=adamw: both moments, every round
Two gradients per local step.
"""

import math

import jax
import jax.numpy as jnp
import optax

from fedgalore_jax.corrections import SamState, sam_with_dual
from fedgalore_jax.optimizer import find_state, with_state
from fedgalore_jax.strategies.base import Common, Strategy, require, scaled
from fedgalore_jax.strategies.feddyn import feddyn


def fedsmoo(common: Common, *, rho: float = 0.1, lam: float = 0.1, client: str = "sgd") -> Strategy:
    """Builds FedSMOO.

    Args:
      common: options shared by all strategies.
      rho: length of the perturbation.
      lam: strength of FedDyn's regulariser.
      client: the clients' optimizer, "sgd" or "adamw".

    Returns:
      A `Strategy`; `ServerState.extra` is `{"h", "consensus"}`, a client's memory `{"h", "dual"}`.
    """
    require("rho", rho, 0 < rho < math.inf, "a positive, finite number")
    base = feddyn(common, sam_with_dual(rho), lam=lam, client=client)

    def init(params, key, num_clients):
        state = base.init(params, key, num_clients)
        return state._replace(extra=state.extra | {"consensus": state.extra["h"]})

    def client_init(params, id):
        memory = base.client_init(params, id)
        return memory | {"dual": memory["h"]}

    def start(download, client_state, ops):
        local = base.start(download, client_state, ops)
        opt = with_state(local.opt, SamState(client_state["dual"]))
        return local._replace(opt=opt, extra=local.extra | {"consensus": download.extra["consensus"]})

    def finish(download, local, client_state, ops):
        upload, memory = base.finish(download, local, client_state, ops)
        dual = find_state(local.opt, SamState).dual
        mine = upload.sum | {"dual": scaled(dual, ops.share)}
        return upload._replace(sum=mine), memory | {"dual": dual}

    def aggregate(state, upload, cohort):
        state, metrics = base.aggregate(state, upload, cohort)
        total = upload.sum["dual"]  # normalised, so the sum is as good as the mean
        norm = jnp.maximum(optax.tree.norm(total), 1e-12)
        consensus = jax.tree.map(lambda x: rho * x / norm.astype(x.dtype), total)
        return state._replace(extra=state.extra | {"consensus": consensus}), metrics

    return base._replace(
        init=init,
        client_init=client_init,
        start=start,
        finish=finish,
        aggregate=aggregate,
        wire_down=lambda download: (download.trainable, download.extra["consensus"]),
    )
