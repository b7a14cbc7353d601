"""FedEx-LoRA: FedIT whose averaging error is added to the frozen base, so that aggregation is exact.

Singhal et al., 2410.09432, and the authors' code [V], with weights p_i in place of their equal ones. The
residual sum_i p_i A_i B_i - A B goes to the clients as the factors it is made of (the means follow from
them); the base takes it in float32.

Ledger (m x n kernel, C clients in the round, floats per client and round)
  trained         A and B of every adapt kernel; train leaves in full
  frozen          the base during the round, freeze leaves
  down            C r(m + n); a client that missed a round needs that round's factors as well
  up              r(m + n)
  kept by client  the base with all residuals
  re-initialised  both moments, every round
The server sees every client's factors (lane `stack`): not for secure aggregation.
"""

from fedgalore_jax.strategies.base import Common, Strategy
from fedgalore_jax.strategies.fedit import fedit
from fedgalore_jax.strategies.lora import beside, factors_of, product, stacked


def fedex_lora(common: Common, *, client: str = "adamw") -> Strategy:
    """Builds FedEx-LoRA.

    Args:
      common: options shared by all strategies.
      client: the clients' optimizer, "adamw" or "sgd".

    Returns:
      A `Strategy`; the base in `ServerState.frozen` changes every round.
    """
    base = fedit(common, client=client)

    def finish(download, local, client_state, ops):
        upload, memory = base.finish(download, local, client_state, ops)
        return upload._replace(stack=factors_of(local.trainable)[0]), memory

    def aggregate(state, upload, cohort):
        state, metrics = base.aggregate(state, upload, cohort)
        frozen, present = dict(state.frozen), cohort.weights.sum()
        for path, rows in upload.stack.items():
            mean, wide = state.trainable[path], stacked(rows, common.lora_scale * cohort.weights)
            less = (-common.lora_scale * present).astype(mean.b.dtype)
            pair = beside(wide, (mean.a, less * mean.b))
            frozen[path] = frozen[path] + product(pair.a, pair.b).astype(frozen[path].dtype)
        return state._replace(frozen=frozen), metrics

    return base._replace(
        finish=finish,
        aggregate=aggregate,
        wire_down=lambda download: factors_of(download.trainable)[1],
        wire_up=lambda upload: (upload.stack, factors_of(upload.mean["change"])[1]),
        relay=lambda stack: stack,
        adapter=None,
        comparable=False,
    )
