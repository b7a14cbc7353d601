"""FedProx: FedAvg whose clients are pulled back to the global weights.

Li et al., 1812.06127: the local loss gains (mu / 2) |w - w_t|^2. With AdamW clients the term goes through
Adam with the gradient (coupled) [I].

Ledger (m x n kernel, floats per client and round)
  trained         adapt and train leaves, in full
  frozen          freeze leaves
  down            mn
  up              mn
  kept by client  nothing
  re-initialised  both moments, every round
"""

import math

from fedgalore_jax.corrections import proximal
from fedgalore_jax.strategies.base import Common, Strategy, require
from fedgalore_jax.strategies.fedavg import fedavg


def fedprox(common: Common, *, mu: float = 0.01, client: str = "adamw") -> Strategy:
    """Builds FedProx.

    Args:
      common: options shared by all strategies.
      mu: strength of the pull; the paper's grid is 0.001 to 1 [M].
      client: the clients' optimizer, "adamw" or "sgd".

    Returns:
      A `Strategy`.
    """
    require("mu", mu, 0 <= mu < math.inf, "a finite number >= 0")
    return fedavg(common, common.optimizer(client, proximal(mu)))
