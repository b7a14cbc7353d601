"""ILoRA: factors from a QR, one nested subspace for clients of any rank, control variates of their gradients.

2511.16069 [V2]: factors start as the first columns and rows of the QR of each kernel, which is reduced by
their product; the server takes the QR of sum_i p_i B_i A_i and sends both parts, of which a client trains its
first r_i. Not read, and ours [I]: a client holds the components beyond r_i as they were sent, so that all
start a round from the global model and no update counts twice; the largest rank's scale serves all; the
control variates are SCAFFOLD's, in the factors' coordinates, before Adam, and their mean is, for each
component, over the clients that train it, each alike.

Ledger (m x n kernel, floats per client and round)
  trained         the first r_i components of A and B of every adapt kernel; train leaves in full
  frozen          the reduced kernels, the other components, freeze leaves
  down            r(m + n), and r_i (m + n) (c)
  up              2 r_i (m + n) (factors, change of c_i)
  kept by client  r(m + n) (c_i)
  re-initialised  both moments, every round
variates=false leaves out c and c_i. An unpivoted QR cut at r is no best fit: the metric `lost` is the share
of the mean products' squared norm that it drops. The server sees every client's factors (lane `stack`): not
for secure aggregation.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax

from fedgalore_jax import tree
from fedgalore_jax.corrections import GradientSum, add_extra, keep_where, sum_gradients
from fedgalore_jax.lowrank import orthonormalise
from fedgalore_jax.optimizer import find_state
from fedgalore_jax.strategies.base import Common, Local, ServerState, Strategy, Upload, add
from fedgalore_jax.strategies.fedit import fedit
from fedgalore_jax.strategies.lora import (
    along_rank,
    at_rank,
    by_rank,
    factors_of,
    product,
    squared_norm,
    stacked,
    wire_of,
)
from fedgalore_jax.types import LoRA

_TINY = 1e-30


def ilora(common: Common, *, variates: bool = True, client: str = "adamw") -> Strategy:
    """Builds ILoRA.

    Args:
      common: options shared by all strategies; `ranks` may differ.
      variates: whether control variates correct the clients' gradients.
      client: the clients' optimizer, "adamw" or "sgd".

    Returns:
      A `Strategy`; `ServerState.extra` is c, a client's memory is its c_i.
    """
    scale, mask = common.lora_scale, keep_where("active")
    corrections = (sum_gradients(), add_extra("correction")) if variates else ()
    tx = optax.chain(mask, common.optimizer(client, *corrections), mask)
    base = fedit(common, tx)

    def leading(first, times):
        """The first columns and rows of the QR of a transposed matrix `[..., m, n]`, transposed back.

        `first` are its first r rows, which alone make those columns of Q; `times(q)` is the matrix times q,
        and that is R. Nothing of size mn is formed.
        """
        q = orthonormalise(first.mT, jax.random.key(0))  # the key replaces dependent columns only
        return LoRA(times(q), q.mT)

    def init(params, key, num_clients):
        adapt, _, _ = common.split(tree.flatten(params))
        for path, w in adapt.items():
            if common.rank > (most := min(w.shape[-2:])):
                raise ValueError(f"rank={common.rank} is too large for {path} {w.shape}: give at most {most}")
        state = base.init(params, key, num_clients)
        trainable, frozen = dict(state.trainable), dict(state.frozen)
        for path, w in adapt.items():
            a, b = leading(w[..., : common.rank, :], partial(product, w))
            trainable[path] = LoRA((a / scale).astype(w.dtype), b.astype(w.dtype))
            frozen[path] = w - scale * product(*trainable[path])
        extra = jax.tree.map(jnp.zeros_like, trainable) if variates else ()
        return state._replace(trainable=trainable, frozen=frozen, extra=extra)

    def client_init(params, id):
        del id
        if not variates:
            return ()
        like = jax.eval_shape(lambda: base.init(params, jax.random.key(0), 0).trainable)
        return jax.tree.map(jnp.zeros_like, like)

    def start(download, client_state, ops):
        trainable = download.trainable
        active = at_rank(jax.tree.map(jnp.ones_like, trainable), common.rank_of(ops.id))
        extra = {"active": active}
        if variates:
            away = jax.tree.map(jnp.subtract, download.extra, client_state)
            extra["correction"] = jax.tree.map(jnp.multiply, active, away)
        return Local(trainable, tx.init(trainable), extra)

    def finish(download, local, client_state, ops):
        del ops
        factors, head = factors_of(local.trainable)
        change = {path: leaf - download.trainable[path] for path, leaf in head.items()}
        upload = Upload(mean={"change": change}, stack=factors)
        if not variates:
            return upload, client_state
        variate = find_state(local.opt, GradientSum).mean()
        return upload._replace(sum=jax.tree.map(jnp.subtract, variate, client_state)), variate

    def aggregate(state, upload, cohort):
        present = cohort.weights.sum() > 0
        trainable, total, kept = dict(state.trainable), 0.0, 0.0
        trainable |= add(factors_of(trainable)[1], upload.mean["change"])
        for path, rows in upload.stack.items():
            a, b = stacked(rows, cohort.weights)
            new = leading(product(a[..., : common.rank, :], b), lambda q, a=a, b=b: product(a, product(b, q)))
            total = total + squared_norm(a, b).sum()
            kept = kept + jnp.square(new.a).sum()
            trainable[path] = jax.tree.map(
                lambda x, old: jnp.where(present, x, old).astype(old.dtype), new, trainable[path]
            )
        extra = state.extra
        if variates:
            ranks = common.rank_of(jnp.arange(cohort.num_clients))
            holders = (jnp.arange(common.rank)[:, None] < ranks[None]).sum(1)  # of each component
            factors, head = factors_of(upload.sum)
            mean = along_rank(factors, 1 / jnp.maximum(holders, 1))
            extra = add(extra, mean | {path: x / cohort.num_clients for path, x in head.items()})
        metrics = {"lost": jnp.maximum(1 - kept / jnp.maximum(total, _TINY), 0) * present}
        return ServerState(trainable, state.frozen, extra, state.round + 1), metrics

    return base._replace(
        init=init,
        client_init=client_init,
        start=start,
        finish=finish,
        aggregate=aggregate,
        wire_down=lambda download: [
            (download.trainable, variate) for variate in by_rank(common, download.extra)
        ],
        wire_up=lambda upload: by_rank(common, upload),
        wire_of=wire_of(common),
        comparable=False,
        adapter=None,
    )
