"""The client's AdamW: moments that may come from the server, a step size that spans rounds.

optax's Adam has one counter for both moments and starts at zero. A federated client may be handed a
second moment that has already seen many steps next to a first moment that starts afresh, so each keeps a
count of its own. Counters and the global step are never batched over clients (docs/design.md, F1).
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedgalore_jax.types import Array, Tree

Schedule = Callable[[Array], Array | float]
"""Learning rate by global step (round * K + local step)."""


class WarmAdamState(NamedTuple):
    """Adam's moments, each with the number of steps it has seen.

    Attributes:
      count_m, count_v: int32 scalars, for the bias correction of `mu` and of `nu`.
      mu, nu: pytrees like the trained parameters.
    """

    count_m: Array
    count_v: Array
    mu: Tree
    nu: Tree


def scale_by_warm_adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-6) -> optax.GradientTransformation:
    """Adam whose two moments carry their own step counts.

    From a fresh state it is `optax.scale_by_adam(b1, b2, eps)` exactly. The default epsilon is larger than
    optax's: a key bias has gradient exactly 0, and at 1e-8 Adam turns its rounding noise into steps.

    Args:
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the bias-corrected second moment.

    Returns:
      A transformation whose state is a `WarmAdamState`.

    References:
      Kingma & Ba, Adam (1412.6980); separate counts are ours [I].
    """

    def init(params):
        # Arrays of their own: a state whose buffers are given up must not hold one twice.
        counts = (jnp.zeros((), jnp.int32) for _ in range(2))
        moments = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        return WarmAdamState(*counts, *moments)

    def update(updates, state, params=None):
        del params
        count_m, count_v = state.count_m + 1, state.count_v + 1
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment(updates, state.nu, b2, 2)
        mu_hat = optax.tree.bias_correction(mu, b1, count_m)
        nu_hat = optax.tree.bias_correction(nu, b2, count_v)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu_hat, nu_hat)
        return updates, WarmAdamState(count_m, count_v, mu, nu)

    return optax.GradientTransformation(init, update)


def adam_state(opt: Tree) -> WarmAdamState:
    """The one `WarmAdamState` inside a composed optimizer state."""
    return find_state(opt, WarmAdamState)


def find_state(opt: Tree, kind: type) -> Any:
    """The one state of a type inside a composed optimizer state."""

    def wanted(node):
        return isinstance(node, kind)

    (state,) = (leaf for leaf in jax.tree.leaves(opt, is_leaf=wanted) if wanted(leaf))
    return state


def with_state(opt: Tree, state: Any) -> Tree:
    """The composed optimizer state with its one state of `state`'s type exchanged for `state`."""

    def wanted(node):
        return isinstance(node, type(state))

    return jax.tree.map(lambda node: state if wanted(node) else node, opt, is_leaf=wanted)


def adamw_tail(
    lr: float | Schedule, weight_decay: float, lr_ratio: Sequence[tuple[str, float | Array]] = ()
) -> optax.GradientTransformationExtraArgs:
    """What follows Adam in AdamW: decoupled decay, then the step size, in optax's order.

    Args:
      lr: learning rate, or a schedule of the global `step`, which `update` takes as an extra argument.
      weight_decay: lambda. It applies to leaves named `kernel`, and to `shrink`, the factor of the frozen
        kernels of the factored path (docs/design.md, F2); biases, norms and embeddings do not decay.
      lr_ratio: ordered `(path regex, factor)`; the first match multiplies a leaf's learning rate.

    Returns:
      A transformation over a dict keyed by parameter path.
    """

    def init(params):
        del params
        return optax.EmptyState()

    def update(updates, state, params: Any = None, **extra):
        rate = lr(extra["step"]) if callable(lr) else lr

        def one(path, update, param):
            factor = next((f for pattern, f in lr_ratio if re.match(pattern, path)), 1.0)
            if weight_decay and path.rsplit("/")[-1] in ("kernel", "shrink"):
                update = jax.tree.map(lambda u, p: u + weight_decay * p, update, param)
            return jax.tree.map(lambda u: (-rate * factor * u).astype(u.dtype), update)

        return {path: one(path, updates[path], params[path]) for path in updates}, state

    return optax.GradientTransformationExtraArgs(init, update)
