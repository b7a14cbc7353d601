"""FFA-LoRA: federated LoRA with A frozen at its random start, so that averaging B is exact.

Sun et al., 2403.12313 [V2]. A follows from a seed; it is ours uniform as peft draws it, the authors' is
Gaussian [V2]. The rows that an update can have are fixed for good.

Ledger (m x n kernel, floats per client and round)
  trained         B of every adapt kernel; train leaves in full
  frozen          every kernel, A, freeze leaves
  down            rn
  up              rn
  kept by client  A, or the seed that it follows from
  re-initialised  both moments, every round
In the in x out layout the paper's A is our `a [m, r]`, its B our `b [r, n]`.
"""

from fedgalore_jax.strategies.base import Common, Strategy
from fedgalore_jax.strategies.fedit import fedit
from fedgalore_jax.strategies.lora import factors_of, merged, with_adapters
from fedgalore_jax.types import LoRA


def ffa_lora(common: Common, *, client: str = "adamw") -> Strategy:
    """Builds FFA-LoRA.

    Args:
      common: options shared by all strategies.
      client: the clients' optimizer, "adamw" or "sgd".

    Returns:
      A `Strategy`; `ServerState.extra` is `{path: a}`.
    """
    base = fedit(common, client=client)

    def init(params, key, num_clients):
        state = base.init(params, key, num_clients)
        factors, rest = factors_of(state.trainable)
        b = {path: leaf.b for path, leaf in factors.items()}
        return state._replace(trainable=b | rest, extra={path: leaf.a for path, leaf in factors.items()})

    def pairs(state, trainable):
        return {path: LoRA(a, trainable[path]) for path, a in state.extra.items()}

    def model(state, trainable):
        return with_adapters(state.frozen, trainable | pairs(state, trainable), common.lora_scale)

    return base._replace(
        init=init,
        assemble=lambda download, trainable, extra: model(download, trainable),
        export=lambda state, client_state=None: merged(model(state, state.trainable)),
        adapter=lambda state: (pairs(state, state.trainable), common.lora_scale * common.rank),
    )
