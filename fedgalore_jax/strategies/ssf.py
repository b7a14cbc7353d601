"""SSF: SCAFFOLD whose steps, control variates and messages live in a random subspace of the round.

2604.25467 [V2]: a random orthonormal P_t is shared each round, local steps are corrected inside it, and
"backfill" keeps what the control variates hold outside of it. The equations are ours [I], for each kernel on
its input side: W = W_t + P z, a step takes P'g - P'c_i + P'c, the new coefficients are the mean raw P'g of
the round (see `scaffold`), and c_i <- c_i - P P'c_i + P (new); c is the mean of all c_i by sample counts.

Ledger (m x n kernel, floats per client and round)
  trained         Z [r, n] of every adapt kernel; train leaves in full
  frozen          P [m, r], freeze leaves
  down            2rn (last mean Z, P'c), and a seed; absent clients need Z of the rounds they missed as well
  up              2rn (Z, change of the coefficients)
  kept by client  mn (c_i), and the base model
  re-initialised  the basis and Z, every round; client=adamw: both moments
"""

import jax
import jax.numpy as jnp

from fedgalore_jax import tree
from fedgalore_jax.corrections import GradientSum, add_extra, sum_gradients
from fedgalore_jax.optimizer import find_state
from fedgalore_jax.strategies.base import (
    Common,
    Download,
    Local,
    ServerState,
    Strategy,
    add,
    require,
    scaled,
)
from fedgalore_jax.strategies.fedavg import fedavg
from fedgalore_jax.strategies.lora import product
from fedgalore_jax.strategies.subspaces import Subspaces
from fedgalore_jax.types import Adapted


def ssf(common: Common, *, client: str = "sgd") -> Strategy:
    """Builds SSF.

    Args:
      common: options shared by all strategies; weight decay would leave the subspace and is refused.
      client: the clients' optimizer, "sgd" or "adamw".

    Returns:
      A `Strategy`; `ServerState.extra` is `{"variate": c, "step": last mean change, "seed": key}`, a client's
      memory its c_i.
    """
    require("weight_decay", common.weight_decay, common.weight_decay == 0, "0: ssf stays in its subspace")
    base = fedavg(common, common.optimizer(client, sum_gradients(), add_extra("correction")))

    def down(bases, flat):
        """Coordinates of what has a basis; the rest as it is."""
        return {path: product(bases[path].mT, x) if path in bases else x for path, x in flat.items()}

    def up(bases, flat):
        return {path: product(bases[path], x) if path in bases else x for path, x in flat.items()}

    space = Subspaces(common.rank, "left")

    def bases_of(state):
        key = jax.random.fold_in(state.extra["seed"], state.round)
        return space.random(common.adapted(state.trainable), key)

    def init(params, key, num_clients):
        state = base.init(params, key, num_clients)
        space.check(common.adapted(state.trainable))
        zeros = jax.tree.map(jnp.zeros_like, state.trainable)
        state = state._replace(extra={"seed": key})
        step = down(bases_of(state), zeros)
        return state._replace(extra={"variate": zeros, "step": step, "seed": key})

    def broadcast(state):
        bases, kernels = bases_of(state), common.adapted(state.trainable)
        head = {path: x for path, x in state.trainable.items() if path not in bases}
        zeros = down(bases, jax.tree.map(jnp.zeros_like, kernels))
        extra = state.extra | {"bases": bases, "variate": down(bases, state.extra["variate"])}
        return Download(zeros | head, state.frozen | kernels, extra, state.round)

    def assemble(download, trainable, extra):
        del extra
        bases = download.extra["bases"]
        kernels = {path: Adapted(download.frozen[path], p, trainable[path]) for path, p in bases.items()}
        return tree.unflatten(download.frozen | trainable | kernels)

    def client_init(params, id):
        del id
        return jax.tree.map(jnp.zeros_like, common.trained(params))

    def start(download, client_state, ops):
        del ops
        own = down(download.extra["bases"], client_state)
        correction = jax.tree.map(jnp.subtract, download.extra["variate"], own)
        opt = base.tx.init(download.trainable)
        return Local(download.trainable, opt, {"correction": correction})

    def finish(download, local, client_state, ops):
        upload, _ = base.finish(download, local, (), ops)
        bases = download.extra["bases"]
        new = find_state(local.opt, GradientSum).mean()
        moved = jax.tree.map(jnp.subtract, new, down(bases, client_state))
        return upload._replace(sum=scaled(moved, ops.share)), add(client_state, up(bases, moved))

    def aggregate(state, upload, cohort):
        del cohort
        bases, step = bases_of(state), upload.mean["change"]
        variate = add(state.extra["variate"], up(bases, upload.sum))
        extra = state.extra | {"variate": variate, "step": step}
        return ServerState(add(state.trainable, up(bases, step)), state.frozen, extra, state.round + 1), {}

    def wire_down(download):
        return download.extra["step"], download.extra["variate"], download.extra["seed"]

    return base._replace(
        init=init,
        broadcast=broadcast,
        assemble=assemble,
        client_init=client_init,
        start=start,
        finish=finish,
        aggregate=aggregate,
        wire_down=wire_down,
        catch_up=lambda download: {path: download.extra["step"][path] for path in download.extra["bases"]},
    )
