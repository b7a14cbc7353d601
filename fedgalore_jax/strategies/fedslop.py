"""FedSLoP: momentum SGD in a random subspace that all clients share for a round.

2604.24012, and the authors' code [V]: gradients of kernels are projected on the input side, g P P', and
momentum SGD follows; the server averages full weights. There the momentum outlives the round in a basis that
it was not made in; here it restarts with the basis, in r n floats [I]. The basis is uniform, from a seed.

Ledger (m x n kernel, floats per client and round)
  trained         adapt leaves along P [m, r], train leaves in full
  frozen          freeze leaves
  down            mn, and a seed
  up              mn, as in their code (it could be rn)
  kept by client  nothing
  re-initialised  the basis and the momentum, every round
"""

import jax
import optax

from fedgalore_jax.strategies.base import Common, Download, Strategy, require
from fedgalore_jax.strategies.fedavg import fedavg
from fedgalore_jax.strategies.subspaces import Subspaces, in_given_bases


def fedslop(common: Common, *, momentum: float = 0.8) -> Strategy:
    """Builds FedSLoP.

    Args:
      common: options shared by all strategies; clipping acts on the projected gradient.
      momentum: mu in u <- mu u + g; 0.8 [V].

    Returns:
      A `Strategy`; `ServerState.extra` is the seed of all bases, a PRNG key.
    """
    require("momentum", momentum, 0 <= momentum < 1, "a number in [0, 1)")

    space = Subspaces(common.rank, "left")
    inner = optax.chain(common.clipping(), optax.trace(momentum))
    base = fedavg(common, optax.chain(in_given_bases(inner, common, space), common.tail()))

    def init(params, key, num_clients):
        state = base.init(params, key, num_clients)
        space.check(common.adapted(state.trainable))
        return state._replace(extra=key)

    def broadcast(state):
        kernels = common.adapted(state.trainable)
        bases = space.random(kernels, jax.random.fold_in(state.extra, state.round))
        return Download(state.trainable, state.frozen, {"seed": state.extra, "bases": bases}, state.round)

    def start(download, client_state, ops):
        return base.start(download, client_state, ops)._replace(extra=download.extra["bases"])

    return base._replace(
        init=init,
        broadcast=broadcast,
        start=start,
        wire_down=lambda download: (download.trainable, download.extra["seed"]),
    )
