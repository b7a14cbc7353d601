"""FR-LoRA: every round starts from the principal components of the kernels, and ends in the base.

ICLR 2025 (OpenReview e0rQRMUhs7), and the authors' code [V]: A0, B0 come once from the SVD of each kernel,
which is reduced by their product; the server averages A and B separately (equal weights there, p_i here),
adds s (A B - A0 B0) to the base, and everyone starts again from A0, B0. Moments restart with them [I]: in
the released code they persist, and the trainer that its default selects leaves A frozen [V].

Ledger (m x n kernel, floats per client and round)
  trained         A and B of every adapt kernel, from A0 and B0; train leaves in full
  frozen          the base during the round, freeze leaves
  down            r(m + n), the means to be folded in; absent clients need them as well
  up              r(m + n)
  kept by client  the base, A0 and B0
  re-initialised  A, B and both moments, every round
"""

import jax
import jax.numpy as jnp

from fedgalore_jax import tree
from fedgalore_jax.lowrank import factored_svd, leading_subspace
from fedgalore_jax.strategies.base import Common, ServerState, Strategy, add
from fedgalore_jax.strategies.fedit import fedit
from fedgalore_jax.strategies.lora import beside, factors_of, product
from fedgalore_jax.types import LoRA


def fr_lora(common: Common, *, client: str = "adamw") -> Strategy:
    """Builds FR-LoRA.

    Args:
      common: options shared by all strategies.
      client: the clients' optimizer, "adamw" or "sgd".

    Returns:
      A `Strategy`; `ServerState.trainable` holds A0 and B0, `extra` the last round's means.
    """
    base, scale = fedit(common, client=client), common.lora_scale

    def principal(kernel, key):
        """`s * a @ b` is the kernel's best approximation of that rank, split evenly."""
        basis = leading_subspace(kernel, common.rank, finder="gram", key=key)
        u, s, vt = factored_svd(basis, product(basis.mT, kernel), common.rank)
        root = jnp.sqrt(s / scale)
        a, b = u * jnp.broadcast_to(root[..., None, :], u.shape), root[..., None] * vt
        return LoRA(a.astype(kernel.dtype), b.astype(kernel.dtype))

    def init(params, key, num_clients):
        del num_clients
        adapt, train, freeze = common.split(tree.flatten(params))
        keys = {path: jax.random.fold_in(key, i) for i, path in enumerate(adapt)}
        factors = {path: principal(w, keys[path]) for path, w in adapt.items()}
        less = {path: w - scale * product(*factors[path]) for path, w in adapt.items()}
        return ServerState(factors | train, freeze | less, factors, jnp.zeros((), jnp.int32))

    def aggregate(state, upload, cohort):
        del cohort
        factors, head = factors_of(state.trainable)
        changed, moved = factors_of(upload.mean["change"])
        means, frozen = add(factors, changed), dict(state.frozen)
        for path, mean in means.items():
            first = factors[path]
            pair = beside((mean.a, scale * mean.b), (first.a, -scale * first.b))
            frozen[path] = frozen[path] + product(pair.a, pair.b).astype(frozen[path].dtype)
        return ServerState(factors | add(head, moved), frozen, means, state.round + 1), {}

    return base._replace(
        init=init,
        aggregate=aggregate,
        wire_down=lambda download: (factors_of(download.trainable)[1], download.extra),
        catch_up=lambda download: download.extra,
        adapter=None,
    )
