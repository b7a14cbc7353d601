"""LoRA-FAIR: FedIT with a correction of B that brings the product of the means to the mean of the products.

2411.14961 [V2]: dB = argmin 1 - cos(sum_i p_i A_i B_i, A (B + dB)) + lam |dB|^2, here by 200 gradient steps
of 0.1 from zero, as a third-party port does it [V]; the paper's own solver was not read. A cosine curves by
1 / |A B|^2, and where A B is small plain steps would throw B far beyond the minimum: they are scaled by
min(1, |A B|^2) [I]. Everything is computed from r x r and r x n products: nothing of size mn is formed [I].
`solver="ls"` is ours, LoRA-FAIR-LS: the Frobenius distance in place of the cosine, in closed form [I].

Ledger (m x n kernel, floats per client and round)
  trained         A and B of every adapt kernel; train leaves in full
  frozen          every kernel, freeze leaves
  down            r(m + n)
  up              r(m + n)
  kept by client  nothing
  re-initialised  both moments, every round
The server sees every client's factors (lane `stack`): not for secure aggregation.
"""

import math

import jax
import jax.numpy as jnp

from fedgalore_jax.lowrank import ridge
from fedgalore_jax.strategies.base import Common, Strategy, require
from fedgalore_jax.strategies.fedit import fedit
from fedgalore_jax.strategies.lora import factors_of, product, squared_norm, stacked
from fedgalore_jax.types import LoRA

SOLVERS = ("cosine", "ls")
_STEPS, _RATE, _EPS = 200, 0.1, 1e-30


def lora_fair(
    common: Common, *, solver: str = "cosine", lam: float = 0.01, client: str = "adamw"
) -> Strategy:
    """Builds LoRA-FAIR.

    Args:
      common: options shared by all strategies.
      solver: "cosine" for LoRA-FAIR, "ls" for LoRA-FAIR-LS.
      lam: how much dB costs; 0.01 [V2].
      client: the clients' optimizer, "adamw" or "sgd".

    Returns:
      A `Strategy`.
    """
    require("solver", solver, solver in SOLVERS, f"one of {', '.join(SOLVERS)}")
    require("lam", lam, 0 < lam < math.inf, "a positive, finite number")
    base = fedit(common, client=client)

    def corrected(mean, rows, weights):
        wide, gram = stacked(rows, weights), product(mean.a.mT, mean.a)
        target = product(product(mean.a.mT, wide.a), wide.b)  # a' T, [..., r, n]
        if solver == "ls":
            return mean.b + ridge(gram, target - product(gram, mean.b), lam)
        square = squared_norm(*wide)  # |T|^2
        rate = _RATE * jnp.minimum(squared_norm(*mean), 1)[..., None, None]

        def objective(db):
            b = mean.b + db
            dot, own = (target * b).sum((-2, -1)), (b * product(gram, b)).sum((-2, -1))
            cosine = dot / jnp.sqrt(square * jnp.maximum(own, 0) + _EPS)
            return (1 - cosine).sum() + lam * jnp.square(db).sum()

        def step(_, db):
            return db - rate * jax.grad(objective)(db)

        return mean.b + jax.lax.fori_loop(0, _STEPS, step, jnp.zeros_like(mean.b))

    def finish(download, local, client_state, ops):
        upload, memory = base.finish(download, local, client_state, ops)
        return upload._replace(stack=factors_of(local.trainable)[0]), memory

    def aggregate(state, upload, cohort):
        state, metrics = base.aggregate(state, upload, cohort)
        trainable = dict(state.trainable)
        for path, rows in upload.stack.items():
            mean = trainable[path]
            trainable[path] = LoRA(mean.a, corrected(mean, rows, cohort.weights).astype(mean.b.dtype))
        return state._replace(trainable=trainable), metrics

    return base._replace(
        finish=finish,
        aggregate=aggregate,
        wire_up=lambda upload: (upload.stack, factors_of(upload.mean["change"])[1]),
        comparable=False,
    )
