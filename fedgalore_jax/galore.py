"""GaLore: any optax optimizer inside a low-rank subspace of each kernel's gradient.

A gradient `G [m, n]` is projected on an orthonormal basis P of its rows or columns, the optimizer
runs on the small `PᵀG [r, n]` (left) or `G P [m, r]` (right), and its step is lifted back. This
file, `lowrank.py` and `types.py` can be copied into any optax project.

>>> import jax, jax.numpy as jnp, optax
>>> from fedgalore_jax.galore import galore
>>> x, y = jnp.eye(8, 16), jnp.ones((8, 4))
>>> loss = lambda params: jnp.mean((x @ params["kernel"] - y) ** 2)
>>> params = {"kernel": jnp.zeros((16, 4))}
>>> tx = galore(0.1, rank=2, refresh_every=5, scale=1.0)
>>> state = tx.init(params)
>>> @jax.jit
... def step(params, state):
...     updates, state = tx.update(jax.grad(loss)(params), state, params)
...     return optax.apply_updates(params, updates), state
>>> for _ in range(20):
...     params, state = step(params, state)
>>> bool(loss(params) < 0.02), state[0].inner.mu["kernel"].shape  # 16 x 2 in place of 16 x 4
(True, (16, 2))
"""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedgalore_jax.lowrank import FINDERS, leading_subspace, random_basis
from fedgalore_jax.types import Array, Tree

Mask = Tree | Callable[[Tree], Tree] | None
SIDES = ("short", "long", "left", "right")


class MatrixAxes(NamedTuple):
    """How many trailing axes of an array make up a matrix; axes before these are stack axes.

    For the `mask`, where attention kernels keep their heads apart, and for convolutions.

    >>> params = {"query": jnp.zeros((32, 4, 8)), "out": jnp.zeros((4, 8, 32))}
    >>> mask = {"query": MatrixAxes(1, 2), "out": MatrixAxes(2, 1)}
    >>> state = scale_by_galore(optax.scale_by_adam(), 2, side="left", mask=mask).init(params)
    >>> state.basis["query"].shape, state.inner.mu["query"].shape, state.basis["out"].shape
    ((32, 2), (2, 32), (32, 2))

    Attributes:
      rows: number of axes before the columns, merged into m: the input side of a kernel.
      columns: number of last axes, merged into n.
    """

    rows: int = 1
    columns: int = 1


class GaLoreState(NamedTuple):
    """State of `scale_by_galore`.

    Attributes:
      count: int32 `[]`, updates so far. Keep it un-batched under `vmap` (`in_axes` and `out_axes`
        `GaLoreState(None, 0, 0, 0)`): a batched count makes every update decompose.
      basis: orthonormal `[..., m, r]` (left) or `[..., n, r]` (right) for projected kernels, in
        float32 (or float64); `optax.MaskedNode()` for other leaves.
      rejected: int32 `[]`, how often a matrix (each of a stack counts) kept its basis at a refresh
        because of a zero or non-finite gradient.
      inner: state of the inner transform: `[..., r, n]` or `[..., m, r]` for projected kernels.
    """

    count: Array
    basis: Tree
    rejected: Array
    inner: optax.OptState


def project(matrix: Array, basis: Array, side: str) -> Array:
    """`PᵀG [..., r, n]` for side 'left', `G P [..., m, r]` for 'right', of `matrix [..., m, n]`."""
    return basis.mT @ matrix if side == "left" else matrix @ basis


def project_back(reduced: Array, basis: Array, side: str) -> Array:
    """`P R` for side 'left', `R Pᵀ` for 'right': the `[..., m, n]` with these coordinates."""
    return basis @ reduced if side == "left" else reduced @ basis.mT


def find_basis(
    key: Array, grads: Tree, rank: int, *, finder="subspace", side="short", mask=None, old=None
) -> tuple[Tree, Array]:
    """Bases of the leading singular subspaces of gradients.

    Args:
      key: a PRNG key; leaf i uses `fold_in(key, i)`.
      grads: gradients; 'random' uses only shapes and dtypes.
      rank, finder, side, mask: see `scale_by_galore`.
      old: bases to keep where a gradient is zero or not finite; None: random ones.

    Returns:
      A tree as `GaLoreState.basis`, and the number of matrices refused (int32 `[]`).

    Raises:
      ValueError, TypeError: a bad argument, or a mask that does not fit.
    """
    _check(rank=rank, finder=finder, side=side)
    plans, treedef = jax.tree.flatten(_plans(grads, rank, side, mask))
    olds: list[Any] = [None] * len(plans) if old is None else treedef.flatten_up_to(old)
    found, refused = [], jnp.int32(0)
    for i, (plan, grad, kept) in enumerate(zip(plans, jax.tree.leaves(grads), olds, strict=True)):
        basis, leaf_key = optax.MaskedNode(), jax.random.fold_in(key, i)
        if plan.side and (kept is None or finder == "random"):
            basis = kept = random_basis(leaf_key, plan.basis[:-1], rank, _wide(grad))
        if plan.side and finder != "random":
            matrix = grad.reshape(plan.matrix)
            peak = jnp.max(abs(matrix), (-2, -1), keepdims=True)
            usable = (peak > 0) & jnp.isfinite(peak)
            matrix = matrix if plan.side == "left" else matrix.mT
            basis = leading_subspace(matrix, rank, finder=finder, key=leaf_key)
            basis = jnp.where(usable, basis, kept)
            refused += jnp.sum(~usable, dtype=jnp.int32)
        found.append(basis)
    return treedef.unflatten(found), refused


def in_subspace(
    inner: optax.GradientTransformation, rank: int, *, scale=1.0, side="short", mask: Mask = None
) -> optax.GradientTransformationExtraArgs:
    """Runs a transform on projected gradients, in bases given with every update.

    Args:
      inner: any transform; it sees float32 or float64, projected kernels in their coordinates.
        Params are projected too (so decay inside acts in the subspace); `init` sees zeros there.
      rank, scale, side, mask: see `scale_by_galore`.

    Returns:
      A transform whose `update(grads, state, params=None, *, basis, **extra_args)` takes a tree of
      `find_basis`, and gives `extra_args` to the inner one. The state is the inner one's.

    Raises:
      ValueError, TypeError: a bad argument; when traced, a mask or basis that does not fit.
    """
    _check(rank=rank, side=side, scale=scale)
    inner = optax.with_extra_args_support(inner)

    def down(plan, leaf, basis):
        given = getattr(basis, "shape", None)  # a MaskedNode has none
        if given != plan.basis:  # a wrong rank might broadcast in the inner state
            raise ValueError(f"basis of shape {given} for {leaf.shape}, needs {plan.basis}: use find_basis")
        leaf = leaf.astype(_wide(leaf))
        return project(leaf.reshape(plan.matrix), basis, plan.side) if plan.side else leaf

    def up(plan, leaf, step, basis):
        if plan.side:
            step = project_back(scale * step, basis, plan.side).reshape(leaf.shape)
        return step.astype(leaf.dtype)

    def init(params):
        def start(plan, leaf):
            return jnp.zeros(plan.reduced, _wide(leaf)) if plan.side else leaf.astype(_wide(leaf))

        return inner.init(jax.tree.map(start, _plans(params, rank, side, mask), params))

    def update(updates, state, params: Any = None, *, basis: Any, **extra_args):
        plans = _plans(updates, rank, side, mask)
        reduced = jax.tree.map(down, plans, updates, basis)
        if params is not None:  # compiled away where inner does not read them
            params = jax.tree.map(down, plans, params, basis)
        steps, state = inner.update(reduced, state, params, **extra_args)
        return jax.tree.map(up, plans, updates, steps, basis), state

    # optax's type of an update cannot say that an extra argument is required
    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def scale_by_galore(
    inner: optax.GradientTransformation,
    rank: int,
    *,
    refresh_every: int = 200,
    scale: float = 1.0,
    finder: str = "subspace",
    side: str = "short",
    mask: Mask = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Runs a transform in the leading singular subspace of each kernel's gradient.

    Args:
      inner: the transform to run on coordinates, see `in_subspace`. A refresh keeps its state.
      rank: r. A kernel whose projected side is no longer than r stays unprojected: full rank is the
        inner transform exactly.
      refresh_every: updates 0, `refresh_every`, ... find the bases again, under one `lax.cond`.
      scale: the authors' alpha: multiplies the updates of projected kernels.
      finder: one of `lowrank.FINDERS`; 'svd' is the reference.
      side: of `[m, n]`: 'left' projects the rows, 'right' the columns, 'short' the shorter side (as
        the authors do), 'long' the longer (as `optax.contrib` does); a square goes left.
      mask: what is projected: a tree like the params (or a prefix) of True, False or `MatrixAxes`,
        or a function from params to one. Default: all. Vectors never are.
      seed: the finders' key at update t is `fold_in(fold_in(key(seed), t), leaf index)`.

    Returns:
      A transform with a `GaLoreState`. It computes in float32 (or float64), and casts updates back; on a GPU
      or TPU 'subspace' reads gradients in bfloat16. Inside `shard_map` with weights of each device's own it
      needs `check_vma=False`.

    Raises:
      ValueError, TypeError: a bad argument; when traced, a mask that does not fit.

    References:
      Zhao et al., GaLore: Memory-efficient LLM training by gradient low-rank projection, 2403.03507
    """
    _check(refresh_every=refresh_every, finder=finder, seed=seed)
    core = in_subspace(inner, rank, scale=scale, side=side, mask=mask)

    # Both branches are defined here, not in update: a new function would compile again without jit.
    def refresh(count, grads, old, finder=finder):
        key = jax.random.fold_in(jax.random.key(seed), count)
        return find_basis(key, grads, rank, finder=finder, side=side, mask=mask, old=old)

    def keep(count, grads, old):
        return old, jnp.int32(0)

    def init(params):
        basis, rejected = refresh(0, params, None, "random")
        return GaLoreState(jnp.int32(0), basis, rejected, core.init(params))

    def update(updates, state: Any, params: Any = None, **extra_args):
        count, basis, rejected, inner_state = state
        due = count % refresh_every == 0
        basis, refused = jax.lax.cond(due, refresh, keep, count, updates, basis)
        updates, inner_state = core.update(updates, inner_state, params, basis=basis, **extra_args)
        count = jnp.asarray(optax.safe_increment(count))
        return updates, GaLoreState(count, basis, rejected + refused, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def galore(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    *,
    refresh_every: int = 200,
    scale: float = 0.25,
    finder: str = "subspace",
    side: str = "short",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    mask: Mask = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """GaLore with AdamW: Adam in the subspace, decoupled decay of the whole kernel.

    The authors' `GaLoreAdamW` (with 'short' and 'svd') but for two conventions of optax: ε is added
    after bias correction, and the step itself does not decay (theirs: `scale * (1 - lr * decay)`).

    Args:
      learning_rate: a number or a schedule.
      rank, refresh_every, scale, finder, side, mask, seed: see `scale_by_galore`.
      b1, b2, eps: see `optax.scale_by_adam`.
      weight_decay: of every leaf; to choose leaves, chain `scale_by_galore` with your own decay.

    Returns:
      An `optax.chain` whose `state[0]` is the `GaLoreState`.

    Raises:
      ValueError, TypeError: a bad argument. Of `optax.inject_hyperparams`, ints and a mask that is a function
      are `static_args`.

    References:
      Zhao et al., 2403.03507, and https://github.com/jiaweizhao/GaLore
    """
    _check(learning_rate=learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    options = {"refresh_every": refresh_every, "scale": scale, "finder": finder, "side": side}
    adam = optax.scale_by_adam(b1, b2, eps)
    return optax.chain(
        scale_by_galore(adam, rank, mask=mask, seed=seed, **options),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def _plans(params, rank, side, mask):
    """What to do with each leaf: side (None: as it is) and the shapes of matrix, basis, reduced."""
    if not jax.tree.leaves(params):  # optax.tree_map_params calls init with a placeholder
        return params
    mask = True if mask is None else mask(params) if callable(mask) else mask

    def plan(want, shape, dtype):
        if not isinstance(want, MatrixAxes | bool):
            raise TypeError(f"mask has a leaf {want!r}: use True, False or MatrixAxes")
        if want is False or (want is True and len(shape) < 2):
            return SimpleNamespace(side=None, basis=None)
        rows, columns = MatrixAxes() if want is True else want
        top, split = len(shape) - rows - columns, len(shape) - columns
        if min(rows, columns) < 1 or top < 0:
            raise ValueError(f"mask has {want} for a leaf of shape {shape}: count some of its axes")
        if jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(f"a leaf is {dtype}: mask it, or use optax's split_real_and_imaginary")
        stack, m, n = shape[:top], math.prod(shape[top:split]), math.prod(shape[split:])
        left = {"left": True, "right": False, "short": m <= n, "long": m >= n}[side]
        if rank >= (m if left else n):
            return SimpleNamespace(side=None, basis=None)
        shapes = ((m, n), (m, rank), (rank, n)) if left else ((m, n), (n, rank), (m, rank))
        matrix, basis, reduced = ((*stack, *shape) for shape in shapes)
        at = "left" if left else "right"
        return SimpleNamespace(side=at, matrix=matrix, basis=basis, reduced=reduced)

    return jax.tree.map(
        lambda want, branch: jax.tree.map(lambda leaf: plan(want, leaf.shape, leaf.dtype), branch),
        mask,
        params,
        is_leaf=lambda node: isinstance(node, MatrixAxes),
    )


def _wide(leaf):
    return jnp.promote_types(leaf.dtype, jnp.float32)


def _check(**arguments):
    """Raises for a bad argument; schedules and traced values pass."""
    choices = {"finder": FINDERS, "side": SIDES}
    for name, value in arguments.items():
        if name in choices:
            if value not in choices[name]:
                raise ValueError(f"{name}={value!r}: choose one of {', '.join(choices[name])}")
        elif name in ("rank", "refresh_every", "seed") and type(value) is not int:
            raise TypeError(f"{name}={value!r}: pass a Python int (static_args, in inject_hyperparams)")
        elif isinstance(value, int | float):
            low = 1 if name in ("rank", "refresh_every") else 0
            high = 1 if name in ("b1", "b2") else math.inf
            if not low <= value < high:  # False for NaN
                raise ValueError(f"{name}={value}: use a number from {low} to below {high}")
