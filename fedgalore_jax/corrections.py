"""What federated methods do to a client's gradient or step, as optax transforms.

They read the extra arguments that the client passes (`strategies.base.Strategy.tx`): `extra`, a dict that the
method filled for the round; `start`, where local training began; `grad_fn`, a further gradient on the same
batch. Norms are over everything that is trained, as it is trained.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedgalore_jax.types import Tree

_TINY = 1e-12


def _stateless(update) -> optax.GradientTransformationExtraArgs:
    def init(params):
        del params
        return optax.EmptyState()

    return optax.GradientTransformationExtraArgs(
        init, lambda updates, state, params=None, **extra: (update(updates, params, **extra), state)
    )


def _needing(init, update) -> optax.GradientTransformationExtraArgs:
    """A transform with required extra arguments, which optax's own types cannot express."""
    return optax.GradientTransformationExtraArgs(init, update)


def _norm(tree: Tree):
    return jnp.maximum(optax.tree.norm(tree), _TINY)


def proximal(mu: float) -> optax.GradientTransformationExtraArgs:
    """Adds `mu * (params - start)`, the gradient of FedProx's pull (1812.06127)."""

    def update(updates, params, *, start, **_):
        return jax.tree.map(lambda g, w, w0: g + mu * (w - w0), updates, params, start)

    return _stateless(update)


def add_extra(name: str, factor: float = 1.0) -> optax.GradientTransformationExtraArgs:
    """Adds `factor * extra[name]`, a tree like the params that is constant during the round."""

    def update(updates, params, *, extra, **_):
        del params
        return jax.tree.map(lambda u, x: u + (factor * x).astype(u.dtype), updates, extra[name])

    return _stateless(update)


def keep_where(name: str) -> optax.GradientTransformationExtraArgs:
    """Multiplies by `extra[name]`, a tree of 0s and 1s: what is masked neither learns nor, where this also
    ends the chain, decays."""

    def update(updates, params, *, extra, **_):
        del params
        return jax.tree.map(lambda u, keep: u * keep.astype(u.dtype), updates, extra[name])

    return _stateless(update)


def penalty(function) -> optax.GradientTransformationExtraArgs:
    """Adds the gradient of `function(params, extra)`, a scalar that does not depend on data."""

    def update(updates, params, *, extra, **_):
        return jax.tree.map(jnp.add, updates, jax.grad(function)(params, extra))

    return _stateless(update)


def zero_mean(kind: str) -> optax.GradientTransformationExtraArgs:
    """Projects gradients on the zero-mean hyperplane.

    Args:
      kind: "per_unit" removes the mean over the inputs of each output of a kernel `[..., m, n]` and leaves
        vectors and embeddings alone; "per_tensor" removes the mean over each whole tensor (of each layer).
    """

    def one(path, g):
        if kind == "per_tensor":
            return g - g.mean(tuple(range(path.startswith("layers/"), g.ndim)), keepdims=True)
        return g - g.mean(-2, keepdims=True) if path.rsplit("/")[-1] == "kernel" else g

    def update(updates, params, **_):
        del params
        return {path: one(path, g) for path, g in updates.items()}

    return _stateless(update)


class GradientSum(NamedTuple):
    """State of `sum_gradients`.

    Attributes:
      total: a tree like the params, the sum of the raw gradients so far.
      count: int32 scalar, how many there were.
    """

    total: Tree
    count: Any

    def mean(self) -> Tree:
        """The mean raw gradient."""
        return jax.tree.map(lambda x: x / self.count.astype(x.dtype), self.total)


def sum_gradients() -> optax.GradientTransformationExtraArgs:
    """Passes gradients on and sums them up. First in a chain, it sees them before any correction."""

    def init(params):
        return GradientSum(jax.tree.map(jnp.zeros_like, params), jnp.zeros((), jnp.int32))

    def update(updates, state: Any, params=None, **_):
        del params
        return updates, GradientSum(jax.tree.map(jnp.add, state.total, updates), state.count + 1)

    return optax.GradientTransformationExtraArgs(init, update)


class SamState(NamedTuple):
    """State of `sam_with_dual`: a tree like the params, the dual variable of the perturbation."""

    dual: Tree


def sam_with_dual(rho: float) -> optax.GradientTransformationExtraArgs:
    """Takes the gradient at a perturbed point, whose perturbation is held to a consensus (FedSMOO).

    With `s = extra["consensus"]`: `e = rho * d / |d|` for `d = g - dual - s`; `dual += e - s`; the result is
    the gradient at `params + e`, on the same batch.

    Args:
      rho: length of the perturbation.
    """

    def init(params):
        return SamState(jax.tree.map(jnp.zeros_like, params))

    def update(updates, state: Any, params: Any = None, *, extra, grad_fn, **_):
        away = jax.tree.map(lambda g, dual, s: g - dual - s, updates, state.dual, extra["consensus"])
        norm = _norm(away)
        step = jax.tree.map(lambda d: rho * d / norm.astype(d.dtype), away)
        dual = jax.tree.map(lambda dual, e, s: dual + e - s, state.dual, step, extra["consensus"])
        return grad_fn(optax.apply_updates(params, step)), SamState(dual)

    return _needing(init, update)


class StormState(NamedTuple):
    """State of `storm`: trees like the params.

    Attributes:
      point: where the last step started.
      estimate: the last estimate of the gradient.
      count: int32 scalar, steps so far.
    """

    point: Tree
    estimate: Tree
    count: Any


def storm() -> optax.GradientTransformationExtraArgs:
    """The recursive gradient estimate `v = g(w; B) + v_last - g(w_last; B)`, from `v = g` on the first step.

    Both gradients are taken on the *same* batch: with the last batch's gradient in place of the second, the
    sum would telescope to `g` alone.
    """

    def init(params):
        return StormState(params, jax.tree.map(jnp.zeros_like, params), jnp.zeros((), jnp.int32))

    def update(updates, state: Any, params: Any = None, *, grad_fn, **_):
        warm = state.count > 0
        last = grad_fn(state.point)
        estimate = jax.tree.map(lambda g, v, g0: g + warm * (v - g0), updates, state.estimate, last)
        return estimate, StormState(params, estimate, state.count + 1)

    return _needing(init, update)
