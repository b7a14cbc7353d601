"""FedZMG: FedAvg on gradients without their mean.

2602.18384: clients project gradients on the zero-mean hyperplane, then SGD; the server is FedAvg's [V2]. Over
which axes the mean is taken was not read: both readings are options [I].

Ledger (m x n kernel, floats per client and round)
  trained         adapt and train leaves, in full
  frozen          freeze leaves
  down            mn
  up              mn
  kept by client  nothing
  re-initialised  client=adamw: both moments, every round
"""

from fedgalore_jax.corrections import zero_mean
from fedgalore_jax.strategies.base import Common, Strategy, require
from fedgalore_jax.strategies.fedavg import fedavg

MEANS = ("per_unit", "per_tensor")


def fedzmg(common: Common, *, mean: str = "per_unit", client: str = "sgd") -> Strategy:
    """Builds FedZMG.

    Args:
      common: options shared by all strategies.
      mean: "per_unit" removes the mean over the inputs of each output unit of a kernel (gradient
        centralisation; vectors and embeddings stay) [M], "per_tensor" the mean over each whole tensor [V2].
      client: the clients' optimizer, "sgd" or "adamw".

    Returns:
      A `Strategy`.
    """
    require("mean", mean, mean in MEANS, f"one of {', '.join(MEANS)}")
    return fedavg(common, common.optimizer(client, zero_mean(mean)))
