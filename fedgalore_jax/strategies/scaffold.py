"""SCAFFOLD: control variates take the drift out of the clients' gradients.

Karimireddy et al., 1910.06378. Local steps use g - c_i + c. The new c_i is the mean of the raw minibatch
gradients of the round (as the paper's option I, on the way instead of at the start [I]); for plain SGD that
unclipped is option II, c_i - c + (w_t - w_K) / (K eta), exactly. From the displacement of Adam it would be no
gradient. c is the mean of all c_i by sample counts, as the objective is; the paper's clients weigh alike [I].

Ledger (m x n kernel, floats per client and round)
  trained         adapt and train leaves, in full
  frozen          freeze leaves
  down            2mn (weights, c)
  up              2mn (change, change of c_i)
  kept by client  mn (c_i)
  re-initialised  client=adamw: both moments, every round
"""

import jax
import jax.numpy as jnp

from fedgalore_jax.corrections import GradientSum, add_extra, sum_gradients
from fedgalore_jax.optimizer import find_state
from fedgalore_jax.strategies.base import Common, Strategy, add, scaled
from fedgalore_jax.strategies.fedavg import fedavg


def scaffold(common: Common, *, client: str = "sgd", server_lr: float = 1.0) -> Strategy:
    """Builds SCAFFOLD.

    Args:
      common: options shared by all strategies.
      client: the clients' optimizer, "sgd" or "adamw"; the correction comes before Adam's moments [I].
      server_lr: eta_g, the step along the mean change.

    Returns:
      A `Strategy`; `ServerState.extra` is c, a client's memory is its c_i.
    """
    tx = common.optimizer(client, sum_gradients(), add_extra("correction"))
    base = fedavg(common, tx, server_lr=server_lr)

    def init(params, key, num_clients):
        state = base.init(params, key, num_clients)
        return state._replace(extra=jax.tree.map(jnp.zeros_like, state.trainable))

    def client_init(params, id):
        del id
        return jax.tree.map(jnp.zeros_like, common.trained(params))

    def start(download, client_state, ops):
        correction = jax.tree.map(jnp.subtract, download.extra, client_state)
        return base.start(download, client_state, ops)._replace(extra={"correction": correction})

    def finish(download, local, client_state, ops):
        upload, _ = base.finish(download, local, (), ops)
        variate = find_state(local.opt, GradientSum).mean()
        moved = jax.tree.map(jnp.subtract, variate, client_state)
        return upload._replace(sum=scaled(moved, ops.share)), variate

    def aggregate(state, upload, cohort):
        state, metrics = base.aggregate(state, upload, cohort)
        return state._replace(extra=add(state.extra, upload.sum)), metrics

    return base._replace(
        init=init,
        client_init=client_init,
        start=start,
        finish=finish,
        aggregate=aggregate,
        wire_down=lambda download: (download.trainable, download.extra),
    )
