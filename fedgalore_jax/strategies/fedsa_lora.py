"""FedSA-LoRA: clients train A and B, share A, and keep B: a model for each.

Guo et al., ICLR 2025 [V2]. B and the classifier stay local. There is no global model: `export` needs a
client's memory, and without it gives the model before any B was learned.

Ledger (m x n kernel, floats per client and round)
  trained         A and B of every adapt kernel; train leaves in full
  frozen          every kernel, freeze leaves
  down            rm (A)
  up              rm (A)
  kept by client  rn (B), train leaves
  re-initialised  both moments, every round
In the in x out layout the paper's A is our `a [m, r]`, its B our `b [r, n]`.
"""

import jax
import jax.numpy as jnp

from fedgalore_jax import tree
from fedgalore_jax.strategies.base import Common, Local, Strategy, Upload
from fedgalore_jax.strategies.fedit import fedit
from fedgalore_jax.strategies.lora import factors_of, merged, with_adapters
from fedgalore_jax.types import LoRA


def fedsa_lora(common: Common, *, client: str = "adamw") -> Strategy:
    """Builds FedSA-LoRA.

    Args:
      common: options shared by all strategies.
      client: the clients' optimizer, "adamw" or "sgd".

    Returns:
      A personalised `Strategy`; a client's memory is `{path: b or head leaf}`.
    """
    base = fedit(common, client=client)

    def init(params, key, num_clients):
        state = base.init(params, key, num_clients)
        factors, head = factors_of(state.trainable)
        shared = {path: leaf.a for path, leaf in factors.items()}
        return state._replace(trainable=shared, frozen=state.frozen | head)

    def client_init(params, id):
        del id
        adapt, train, _ = common.split(tree.flatten(params))
        zeros = {
            path: jnp.zeros((*w.shape[:-2], common.rank, w.shape[-1]), w.dtype) for path, w in adapt.items()
        }
        return zeros | train

    def joined(shared, own):
        return own | {path: LoRA(a, own[path]) for path, a in shared.items()}

    def start(download, client_state, ops):
        del ops
        trainable = joined(download.trainable, client_state)
        return Local(trainable, base.tx.init(trainable), ())

    def finish(download, local, client_state, ops):
        del client_state, ops
        factors, head = factors_of(local.trainable)
        shared = {path: leaf.a for path, leaf in factors.items()}
        change = jax.tree.map(jnp.subtract, shared, download.trainable)
        return Upload(mean={"change": change}), {path: leaf.b for path, leaf in factors.items()} | head

    def export(state, client_state=None):
        if client_state is None:
            return tree.unflatten(state.frozen)
        trainable = joined(state.trainable, client_state)
        return merged(with_adapters(state.frozen, trainable, common.lora_scale))

    return base._replace(
        init=init,
        client_init=client_init,
        start=start,
        finish=finish,
        export=export,
        adapter=None,
        personal=True,
    )
