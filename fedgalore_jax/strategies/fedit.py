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

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedgalore_jax import tree
from fedgalore_jax.adapters import lora_factors, merge
from fedgalore_jax.strategies.base import Common, Download, Strategy, add
from fedgalore_jax.strategies.fedavg import fedavg
from fedgalore_jax.types import Adapted, Array, Flat, LoRA


class FedITState(NamedTuple):
    """The server's memory.

    Attributes:
      trainable: `{path: LoRA}` of adapted kernels, `{path: array}` of plainly trained leaves.
      frozen: `{path: array}`, the base model.
      round: int32 scalar.
    """

    trainable: Flat
    frozen: Flat
    round: Array


def fedit(common: Common) -> Strategy:
    """Builds FedIT: FedAvg whose trained leaves are LoRA factors.

    Args:
      common: options shared by all strategies.

    Returns:
      A `Strategy`.
    """

    def init(params, key, num_clients):
        del num_clients
        adapt, train, freeze = common.split(tree.flatten(params))
        factors = {
            path: lora_factors(jax.random.fold_in(key, i), kernel.shape, common.rank, kernel.dtype)
            for i, (path, kernel) in enumerate(adapt.items())
        }
        return FedITState(factors | train, freeze | adapt, jnp.zeros((), jnp.int32))

    def broadcast(state):
        return Download(state.trainable, state.frozen, (), state.round)

    def assemble(download, trainable, extra):
        del extra

        def leaf(path, value):
            if not isinstance(value, LoRA):
                return value
            return Adapted(download.frozen[path], value.a, common.lora_scale * value.b)

        adapted = {path: leaf(path, value) for path, value in trainable.items()}
        return tree.unflatten(download.frozen | adapted)

    def aggregate(state, upload, cohort):
        del cohort
        trainable = add(state.trainable, upload.mean["change"])
        return FedITState(trainable, state.frozen, state.round + 1), {}

    def export(state):
        params = tree.flatten(assemble(broadcast(state), state.trainable, ()))
        return tree.unflatten({path: merge(leaf) for path, leaf in params.items()})

    return fedavg(common)._replace(
        init=init, broadcast=broadcast, assemble=assemble, aggregate=aggregate, export=export
    )
