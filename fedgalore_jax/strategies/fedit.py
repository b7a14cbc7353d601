"""FedIT: federated LoRA; the server averages A and B separately.

Zhang et al., 2305.05644; the averaging rule [M, V2 in several repositories]. Note that the
product of the means is not the mean of the products: that bias is what other methods set out to remove.

Ledger (m x n kernel, floats per client and round)
  trained         A and B of every adapt kernel; train leaves in full
  frozen          every kernel, freeze leaves
  down            r(m + n)
  up              r(m + n)
  kept by client  nothing
  re-initialised  both moments, every round

In the in x out layout the paper's A is our `a [m, r]` (random at the start) and its B our `b [r, n]` (zero).
"""

import jax.numpy as jnp
import optax

from fedgalore_jax import tree
from fedgalore_jax.strategies.base import Common, ServerState, Strategy, add
from fedgalore_jax.strategies.fedavg import fedavg
from fedgalore_jax.strategies.lora import factors_of, fresh_factors, merged, with_adapters


def fedit(
    common: Common, tx: optax.GradientTransformationExtraArgs | None = None, *, client: str = "adamw"
) -> Strategy:
    """Builds FedIT: FedAvg whose trained leaves are LoRA factors.

    Args:
      common: options shared by all strategies.
      tx: the local step of a method that edits this one, in place of `client`.
      client: the clients' optimizer, "adamw" or "sgd".

    Returns:
      A `Strategy`.
    """

    def init(params, key, num_clients):
        del num_clients
        adapt, train, freeze = common.split(tree.flatten(params))
        return ServerState(
            fresh_factors(adapt, key, common.rank) | train, freeze | adapt, (), jnp.zeros((), jnp.int32)
        )

    def assemble(download, trainable, extra):
        del extra
        return with_adapters(download.frozen, trainable, common.lora_scale)

    def aggregate(state, upload, cohort):
        del cohort
        trainable = add(state.trainable, upload.mean["change"])
        return state._replace(trainable=trainable, round=state.round + 1), {}

    def export(state, client_state=None):
        del client_state
        return merged(with_adapters(state.frozen, state.trainable, common.lora_scale))

    def adapter(state):
        return factors_of(state.trainable)[0], common.lora_scale * common.rank

    return fedavg(common, tx, client=client)._replace(
        init=init, assemble=assemble, aggregate=aggregate, export=export, adapter=adapter
    )
