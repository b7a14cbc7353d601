"""What the methods with LoRA factors share: models with adapters, ranks by mask, stacks of factors."""

from functools import partial

import jax
import jax.numpy as jnp

from fedgalore_jax import tree
from fedgalore_jax.adapters import lora_factors, merge
from fedgalore_jax.strategies.base import Common
from fedgalore_jax.types import Adapted, Array, Flat, LoRA, LowRank, Params, Tree

product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def is_lora(leaf: Tree) -> bool:
    """Whether a leaf is a pair of factors."""
    return isinstance(leaf, LoRA)


def factors_of(flat: Flat) -> tuple[Flat, Flat]:
    """Sorts `{path: leaf}` into factors and plainly trained leaves."""
    factors = {path: leaf for path, leaf in flat.items() if is_lora(leaf)}
    return factors, {path: leaf for path, leaf in flat.items() if path not in factors}


def fresh_factors(kernels: Flat, key: Array, rank: int) -> Flat:
    """LoRA's initial factors for each kernel `{path: [..., m, n]}`; a function of key and shapes."""
    return {
        path: lora_factors(jax.random.fold_in(key, i), kernel.shape, rank, kernel.dtype)
        for i, (path, kernel) in enumerate(kernels.items())
    }


def with_adapters(frozen: Flat, trainable: Flat, scale: float | Array) -> Params:
    """The model whose kernels carry the factors in `trainable`, times `scale`."""

    def leaf(path, value):
        if not is_lora(value):
            return value
        return Adapted(frozen[path], value.a, jnp.asarray(scale, value.b.dtype) * value.b)

    return tree.unflatten(frozen | {path: leaf(path, value) for path, value in trainable.items()})


def merged(params: Params) -> Params:
    """The same model with dense kernels."""
    return tree.unflatten({path: merge(leaf) for path, leaf in tree.flatten(params).items()})


def at_rank(flat: Flat, rank: Array) -> Flat:
    """Zeroes the columns of `a` and the rows of `b` beyond a (traced) rank.

    Where both are zero, both gradients are zero: such slots neither move, nor gather moments, nor decay.
    """
    largest = max((leaf.a.shape[-1] for leaf in flat.values() if is_lora(leaf)), default=0)
    return along_rank(flat, jnp.arange(largest) < rank)


def along_rank(flat: Flat, factors: Array) -> Flat:
    """Multiplies the columns of `a` and the rows of `b` by factors `[r]`; other leaves stay."""

    def one(leaf):
        if not is_lora(leaf):
            return leaf
        by = factors.astype(leaf.a.dtype)
        a = leaf.a * jnp.broadcast_to(by, leaf.a.shape)
        return LoRA(a, leaf.b * jnp.broadcast_to(by[:, None], leaf.b.shape))

    return {path: one(leaf) for path, leaf in flat.items()}


def scale_of(common: Common, rank: Array) -> Array:
    """The scale alpha / r of a client of that rank."""
    if common.lora_alpha is None:
        return jnp.asarray(common.lora_scale)
    return common.lora_alpha / rank


def by_rank(common: Common, trees: Tree) -> list[Tree]:
    """The tree as it travels to or from a client of each rank in use (`Strategy.wire_of` of them)."""

    def cut(rank, leaf):
        return LoRA(leaf.a[..., :rank], leaf.b[..., :rank, :]) if is_lora(leaf) else leaf

    ranks = common.ranks or (common.rank,)
    return [jax.tree.map(partial(cut, rank), trees, is_leaf=is_lora) for rank in ranks]


def wire_of(common: Common) -> int:
    """How many messages `by_rank` makes."""
    return len(common.ranks or (common.rank,))


def stacked(rows: LoRA, weights: Array) -> LowRank:
    """The weighted sum of clients' products, as one pair of wide factors.

    Args:
      rows: `a [C, ..., m, r]`, `b [C, ..., r, n]`.
      weights: `[C]`.

    Returns:
      `a [..., m, C r]`, `b [..., C r, n]`, whose product is `sum_i w_i a_i b_i`.
    """
    a, b = jnp.moveaxis(rows.a, 0, -2), jnp.moveaxis(rows.b, 0, -3)  # [..., m, C, r], [..., C, r, n]
    wide = weights.astype(b.dtype)[:, None, None]
    b = b * jnp.broadcast_to(wide, b.shape)
    return LowRank(a.reshape(*a.shape[:-2], -1), b.reshape(*b.shape[:-3], -1, b.shape[-1]))


def squared_norm(a: Array, b: Array) -> Array:
    """|a b|^2 `[...]` of products `[..., m, r] @ [..., r, n]`, tr(a'a bb'): nothing of size mn is formed."""
    squared = (product(a.mT, a) * product(b, b.mT)).sum((-2, -1))
    return jnp.maximum(squared, 0)  # rounding may leave it below


def beside(*pairs: tuple[Array, Array]) -> LowRank:
    """The sum of products `a @ b` as one pair of wide factors."""
    return LowRank(jnp.concatenate([a for a, _ in pairs], -1), jnp.concatenate([b for _, b in pairs], -2))
