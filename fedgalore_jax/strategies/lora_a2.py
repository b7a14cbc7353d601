"""LoRA-A2: alternating factors, and for each client the ranks that matter most to it.

Koo et al., 2410.22815 [V]: rounds alternate between B and A (as RoLoRA; B first, as in their Algorithm 1). A
client first trains the factor in turn without a mask, scores rank i of each kernel by |dB_i| |A_i| (or |B_i|
|dA_i|), keeps the best `local_rank` per kernel on average over all kernels jointly, and then trains from the
start within that mask: gradients, moments and decay are masked alike. The server adds the weighted changes,
masked entries counting as zero. Their scoring takes an epoch, ours the round's own batches [I]; their
classifier is frozen, ours is trained like every method's.

Ledger (m x n kernel, floats per client and round; q = local_rank)
  trained         q ranks of B in rounds 0, 2, ..., of A in rounds 1, 3, ...; train leaves in full
  frozen          every kernel, the other factor, the other ranks, freeze leaves
  down            rm or rn, in turn
  up              qm or qn, in turn (as if each kernel kept q), and q indices
  kept by client  the other factor; a client that was away needs it as well, once: rm or rn, in turn
  re-initialised  both moments, every round
Two gradients per local step.
"""

import jax
import jax.numpy as jnp

from fedgalore_jax.strategies.base import Common, Strategy, require
from fedgalore_jax.strategies.lora import factors_of
from fedgalore_jax.strategies.rolora import rolora
from fedgalore_jax.types import LoRA


def lora_a2(
    common: Common, *, local_rank: int | None = None, b_ratio: float = 5.0, client: str = "adamw"
) -> Strategy:
    """Builds LoRA-A2.

    Args:
      common: options shared by all strategies; `rank` is that of the server's factors.
      local_rank: ranks per kernel that a client trains and sends, on average; half of `rank` by default [I].
      b_ratio: learning rate of B as a multiple of A's; 5 [V].
      client: the clients' optimizer, "adamw" or "sgd".

    Returns:
      A `Strategy`.
    """
    if local_rank is None:
        local_rank = max(common.rank // 2, 1)
    fits = 1 <= local_rank < common.rank or local_rank == common.rank == 1
    require("local_rank", local_rank, fits, f"1 to less than rank={common.rank}")
    base = rolora(common, client=client, b_ratio=b_ratio)

    def start(download, client_state, ops):
        local = base.start(download, client_state, ops)
        factors, _ = factors_of(local.trainable)
        after = ops.train(local, base.tx).trainable

        def score(x: LoRA, y: LoRA):
            """Of each rank `[..., r]`: only the factor in turn has moved."""
            in_b = jnp.linalg.norm(y.b - x.b, axis=-1) * jnp.linalg.norm(x.a, axis=-2)
            in_a = jnp.linalg.norm(y.a - x.a, axis=-2) * jnp.linalg.norm(x.b, axis=-1)
            return in_a + in_b

        scores = {path: score(x, after[path]) for path, x in factors.items()}
        flat = jnp.concatenate([x.reshape(-1) for x in scores.values()])
        _, best = jax.lax.top_k(flat, local_rank * (flat.size // common.rank))
        chosen, masks, begin = jnp.zeros_like(flat).at[best].set(1), dict(local.extra["active"]), 0
        for path, x in scores.items():
            keep, begin = chosen[begin : begin + x.size].reshape(x.shape), begin + x.size
            in_turn = masks[path]
            masks[path] = LoRA(keep[..., None, :] * in_turn.a, keep[..., None] * in_turn.b)
        return local._replace(extra={"active": masks})

    def two_rounds(upload):
        factors, rest = factors_of(upload.mean["change"])
        kept = {path: LoRA(x.a[..., :local_rank], x.b[..., :local_rank, :]) for path, x in factors.items()}
        indices = {path: jnp.zeros((*x.a.shape[:-2], local_rank), jnp.int32) for path, x in factors.items()}
        return kept, indices, indices, rest, rest

    return base._replace(start=start, wire_up=two_rounds, comparable=False)
