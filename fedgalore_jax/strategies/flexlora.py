"""FlexLoRA: the server averages clients' products and deals them out again by a truncated SVD.

Bai et al., 2402.11505, and the authors' code [V]: the SVD of sum_i p_i s_i B_i A_i gives each rank its best
factors, with all singular values in B. Here the mean product stays factored (QR of both stacks, SVD of the
small core): nothing of size mn is formed [I]. What is beyond the rank is lost every round.

Ledger (m x n kernel, floats per client and round)
  trained         A and B of every adapt kernel; train leaves in full
  frozen          every kernel, freeze leaves
  down            r(m + n)
  up              r(m + n)
  kept by client  nothing
  re-initialised  both moments, every round (the factors are rotated)
With different ranks, r is the client's own.
The server sees every client's factors (lane `stack`): not for secure aggregation.
"""

from fedgalore_jax.lowrank import factored_svd
from fedgalore_jax.strategies.base import Common, Local, Strategy, Upload
from fedgalore_jax.strategies.fedit import fedit
from fedgalore_jax.strategies.lora import (
    at_rank,
    by_rank,
    factors_of,
    scale_of,
    stacked,
    wire_of,
    with_adapters,
)
from fedgalore_jax.types import LoRA


def flexlora(common: Common, *, client: str = "adamw") -> Strategy:
    """Builds FlexLoRA.

    Args:
      common: options shared by all strategies; `ranks` may differ.
      client: the clients' optimizer, "adamw" or "sgd".

    Returns:
      A `Strategy`; the server's factors are those of the largest rank.
    """
    base = fedit(common, client=client)

    def rescaled(flat, factor):
        """Factors with the same product under another scale."""

        def one(leaf):
            return LoRA(leaf.a, (factor * leaf.b).astype(leaf.b.dtype)) if isinstance(leaf, LoRA) else leaf

        return {path: one(leaf) for path, leaf in flat.items()}

    def assemble(download, trainable, extra):
        return with_adapters(download.frozen, trainable, extra["scale"])

    def start(download, client_state, ops):
        del client_state
        rank = common.rank_of(ops.id)
        scale = scale_of(common, rank)
        trainable = rescaled(at_rank(download.trainable, rank), common.lora_scale / scale)
        return Local(trainable, base.tx.init(trainable), {"scale": scale})

    def finish(download, local, client_state, ops):
        del ops
        factors, head = factors_of(local.trainable)
        change = {path: leaf - download.trainable[path] for path, leaf in head.items()}
        stack = rescaled(factors, local.extra["scale"] / common.lora_scale)
        return Upload(mean={"change": change}, stack=stack), client_state

    def aggregate(state, upload, cohort):
        trainable = dict(state.trainable)
        for path, d in upload.mean["change"].items():
            trainable[path] = (trainable[path] + d).astype(trainable[path].dtype)
        for path, rows in upload.stack.items():
            wide = stacked(rows, cohort.weights)
            u, s, vt = factored_svd(wide.a, wide.b, common.rank)
            old = trainable[path]
            trainable[path] = LoRA(u.astype(old.a.dtype), (s[..., None] * vt).astype(old.b.dtype))
        return state._replace(trainable=trainable, round=state.round + 1), {}

    return base._replace(
        assemble=assemble,
        start=start,
        finish=finish,
        aggregate=aggregate,
        wire_down=lambda download: by_rank(common, download.trainable),
        wire_up=lambda upload: by_rank(common, upload),
        wire_of=wire_of(common),
        comparable=False,
    )
