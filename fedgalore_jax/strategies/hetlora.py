"""HetLoRA: clients of different, shrinking ranks; the server pads, and weighs by the norm of the products.

Cho et al., 2401.06432 [V2]. Client i trains the first r_i components with a penalty on its tail,
lam |B[:, g r_i:]| |A[g r_i:, :]|; if the tail is smaller after the round than before, r_i falls to
max(r_min, floor(g r_i)) and the tail is dropped. One rank serves all kernels of a client, by the sum of their
tails [I]. The server's weights are |B_i A_i| over their sum, for each kernel [I]; p_i plays no part there. A
component that nobody in a round holds, though others do, stays as it was [I]: padded with zeros it would be
zero in both factors, and have no gradient ever after.

Ledger (m x n kernel, floats per client and round)
  trained         the first r_i of A and B of every adapt kernel; train leaves in full
  frozen          every kernel, freeze leaves
  down            r_i (m + n) (bytes: at the ranks clients start with)
  up              r_i (m + n) + 1 per matrix, its norm; + 1, the rank
  kept by client  1 (r_i); the server counts who holds each component
  re-initialised  both moments, every round
"""

import math

import jax
import jax.numpy as jnp

from fedgalore_jax.corrections import penalty
from fedgalore_jax.strategies.base import Common, Local, Strategy, Upload, require
from fedgalore_jax.strategies.fedit import fedit
from fedgalore_jax.strategies.lora import at_rank, by_rank, factors_of, squared_norm, wire_of
from fedgalore_jax.types import LoRA

_EPS = 1e-12  # under the roots: the gradient of a norm at 0 is NaN without


def hetlora(
    common: Common,
    *,
    gamma: float = 0.99,
    lam: float = 0.01,
    min_rank: int = 1,
    client: str = "adamw",
) -> Strategy:
    """Builds HetLoRA.

    Args:
      common: options shared by all strategies; `ranks` may differ.
      gamma: where the tail begins, as a share of the rank; 0.99 [V].
      lam: weight of the tail's norm; 0.01 in a third-party implementation [V2].
      min_rank: below which no rank falls.
      client: the clients' optimizer, "adamw" or "sgd".

    Returns:
      A `Strategy`; a client's memory is `{"rank": r_i}`, `ServerState.extra` how many clients hold each
      component, `[r]`. The scale is the largest rank's for all [I].
    """
    require("gamma", gamma, 0 < gamma < 1, "a number in (0, 1)")
    require("lam", lam, 0 <= lam < math.inf, "a finite number >= 0")
    require("min_rank", min_rank, 1 <= min_rank <= common.rank, f"1 to rank={common.rank}")

    def tail(trainable, rank):
        """The sum over kernels and layers of `|a_tail| |b_tail|`."""
        start, total = shrunk(rank), 0.0
        for a, b in factors_of(trainable)[0].values():
            j = jnp.arange(a.shape[-1])
            inside = ((j >= start) & (j < rank)).astype(a.dtype)
            by_column, by_row = jnp.square(a).sum(-2), jnp.square(b).sum(-1)  # [..., r]
            inside = jnp.broadcast_to(inside, by_column.shape)
            norms = [jnp.sqrt((x * inside).sum(-1) + _EPS) for x in (by_column, by_row)]
            total = total + (norms[0] * norms[1]).sum()
        return total

    def shrunk(rank):
        return jnp.floor(gamma * rank).astype(jnp.int32)

    def regulariser(params, extra):
        return lam * tail(params, extra["rank"])

    base = fedit(common, common.optimizer(client, penalty(regulariser)))

    def holds(rank):
        """Whether a client of that rank has each component, `[r]`."""
        return (jnp.arange(common.rank) < rank).astype(jnp.float32)

    def init(params, key, num_clients):
        held = jax.vmap(holds)(common.rank_of(jnp.arange(num_clients))).sum(0)
        return base.init(params, key, num_clients)._replace(extra=held)

    def client_init(params, id):
        del params
        return {"rank": common.rank_of(id)}

    def start(download, client_state, ops):
        del ops
        trainable = at_rank(download.trainable, client_state["rank"])
        return Local(trainable, base.tx.init(trainable), client_state)

    def finish(download, local, client_state, ops):
        del ops
        before = client_state["rank"]
        received = at_rank(download.trainable, before)
        smaller = tail(local.trainable, before) < tail(received, before)
        rank = jnp.where(smaller, jnp.maximum(shrunk(before), jnp.minimum(before, min_rank)), before)
        factors, head = factors_of(at_rank(local.trainable, rank))
        total = {}
        for path, (a, b) in factors.items():
            norm = jnp.sqrt(squared_norm(a, b))
            wide = norm[..., None, None]
            total[path] = {"factors": LoRA(wide * a, wide * b), "norm": norm}
        change = {path: leaf - download.trainable[path] for path, leaf in head.items()}
        mean = {"change": change, "rank": rank.astype(jnp.float32)}
        return Upload(mean=mean, sum={"factors": total, "held": holds(rank) - holds(before)}), {"rank": rank}

    def aggregate(state, upload, cohort):
        del cohort
        trainable, held = dict(state.trainable), state.extra + upload.sum["held"]
        for path, d in upload.mean["change"].items():
            trainable[path] = (trainable[path] + d).astype(trainable[path].dtype)
        for path, total in upload.sum["factors"].items():
            (a, b), old = total["factors"], trainable[path]
            norm = jnp.maximum(total["norm"], _EPS)[..., None, None]
            sent = jnp.any(a != 0, -2) | jnp.any(b != 0, -1)  # [..., r]
            stays = ~sent & jnp.broadcast_to(held > 0, sent.shape)
            trainable[path] = LoRA(
                jnp.where(stays[..., None, :], old.a, a / norm),
                jnp.where(stays[..., None], old.b, b / norm),
            )
        state = state._replace(trainable=trainable, extra=held, round=state.round + 1)
        return state, {"mean_rank": upload.mean["rank"]}

    return base._replace(
        init=init,
        client_init=client_init,
        start=start,
        finish=finish,
        aggregate=aggregate,
        wire_down=lambda download: by_rank(common, download.trainable),
        wire_up=lambda upload: by_rank(common, (upload.mean, upload.sum["factors"])),  # "held" follows
        wire_of=wire_of(common),
        comparable=False,
    )
