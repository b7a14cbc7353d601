"""Dual adapters: one LoRA that all clients share beside one that each keeps, trained in turn.

A reduced form of disentangled FL (DFL, Luo et al., ICML 2022, 2206.06818) and not that method: there an
invariant branch is aggregated, a domain-specific branch stays local, and both learn in alternation [V2]. The
authors published no code [V], and how their loss disentangles the branches was not read. Ours are two
adapters of rank r on every kernel, the private one trained in the first half of a round's steps and the
shared one in the second, and a penalty lam |A_shared' A_private|^2 on what both read of their inputs [I].

Ledger (m x n kernel, floats per client and round)
  trained         the private A and B, then the shared A and B, of every adapt kernel; train leaves in full
  frozen          every kernel, the adapter not in turn, freeze leaves
  down            r(m + n) (shared A and B)
  up              r(m + n) (shared A and B)
  kept by client  r(m + n) (private A and B, as changes from a start that follows from a seed)
  re-initialised  both moments, every half of a round
"""

import math
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from fedgalore_jax import tree
from fedgalore_jax.corrections import penalty
from fedgalore_jax.strategies.base import Common, Local, Strategy, Upload, add, require
from fedgalore_jax.strategies.fedit import fedit
from fedgalore_jax.strategies.lora import (
    along_rank,
    beside,
    factors_of,
    fresh_factors,
    merged,
    product,
    with_adapters,
)
from fedgalore_jax.types import LoRA


def dual_adapter(common: Common, *, lam: float = 0.1, client: str = "adamw") -> Strategy:
    """Builds federated LoRA with a shared and a private adapter.

    Args:
      common: options shared by all strategies; `rank` is that of each adapter.
      lam: weight of the penalty [I].
      client: the clients' optimizer, "adamw" or "sgd".

    Returns:
      A personalised `Strategy`; `ServerState.extra` is `{path: the private adapters' start}`, a client's
      memory `{path: LoRA}` its change since. Without a memory `export` gives the shared model.
    """
    require("lam", lam, 0 <= lam < math.inf, "a finite number >= 0")
    r = common.rank

    def overlap(trainable, extra):
        """The sum over kernels and layers of `lam |a_shared' a_private|^2`."""
        del extra
        factors, _ = factors_of(trainable)
        squares = [jnp.square(product(a[..., :r].mT, a[..., r:])).sum() for a, _ in factors.values()]
        return lam * sum(squares)

    tx = optax.chain(penalty(overlap), _in_turn(common.optimizer(client), r))
    base = fedit(common, tx)

    def init(params, key, num_clients):
        state = base.init(params, key, num_clients)
        kernels = {path: state.frozen[path] for path in factors_of(state.trainable)[0]}
        return state._replace(extra=fresh_factors(kernels, jax.random.fold_in(key, 1), r))

    def client_init(params, id):
        del id
        kernels, _, _ = common.split(tree.flatten(params))
        shapes = jax.eval_shape(lambda: fresh_factors(kernels, jax.random.key(0), r))
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def both(state, client_state):
        """Shared and private factors side by side, and the head."""
        private, shared = add(state.extra, client_state), state.trainable
        return shared | {path: LoRA(*beside(shared[path], own)) for path, own in private.items()}

    def start(download, client_state, ops):
        require("local_steps", ops.steps, ops.steps > 1, "2 or more: each adapter of dual_adapter has a half")
        trainable = both(download, client_state)
        switch = download.round * ops.steps + ops.steps // 2
        return Local(trainable, tx.init(trainable), {"switch": switch})

    def finish(download, local, client_state, ops):
        del client_state, ops
        factors, head = factors_of(local.trainable)
        shared = {path: LoRA(a[..., :r], b[..., :r, :]) for path, (a, b) in factors.items()}
        private = {path: LoRA(a[..., r:], b[..., r:, :]) for path, (a, b) in factors.items()}
        change = jax.tree.map(jnp.subtract, shared | head, download.trainable)
        return Upload(mean={"change": change}), jax.tree.map(jnp.subtract, private, download.extra)

    def export(state, client_state=None):
        trainable = state.trainable if client_state is None else both(state, client_state)
        return merged(with_adapters(state.frozen, trainable, common.lora_scale))

    return base._replace(
        init=init, client_init=client_init, start=start, finish=finish, export=export, personal=True
    )


def _in_turn(inner: optax.GradientTransformationExtraArgs, r: int) -> optax.GradientTransformationExtraArgs:
    """Until the global step `extra["switch"]` only the last r ranks learn, and from there on, with `inner`
    started anew, only the first; what is in neither adapter learns in both halves."""

    def update(updates: Any, state, params: Any = None, **more):
        step, switch = more["step"], more["extra"]["switch"]
        turn = (jnp.arange(2 * r) < r) == (step >= switch)
        fresh = inner.init(params)
        state = jax.tree.map(lambda new, old: jnp.where(step == switch, new, old), fresh, state)
        learned, state = inner.update(along_rank(updates, turn), state, params, **more)
        return along_rank(cast(Any, learned), turn), state

    return optax.GradientTransformationExtraArgs(inner.init, update)
