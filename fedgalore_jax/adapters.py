"""Products with adapted kernels, and LoRA's initial factors.

The base product stays un-batched when `vmap` maps over clients' factors only (docs/design.md, F3), so an
adapter is merged into its kernel inside a client only where that moves fewer bytes (F8), and for as long as
one product takes; `merge` is for the server and for export.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fedgalore_jax.types import Adapted, Array, LoRA, LowRank


def matmuls(x: Array, kernels: Sequence[Array | Adapted], dtype: Any = None) -> list[Array]:
    """`x @ kernel` for kernels that may be adapted and read the same `x`.

    Their first factors go together: a product with few columns is spent on reading `x`, so one for query,
    key and value takes a third of the time of three.

    Args:
      x: `[..., m]`.
      kernels: each `[m, n]`, or an `Adapted` of that shape without stack axes. Cast to `x.dtype`.
      dtype: products are summed in it; None is `x.dtype`.

    Returns:
      `[..., n]` in `dtype` for each kernel.
    """

    if _merging_pays(x, kernels):
        adapted = [kernel for kernel in kernels if isinstance(kernel, Adapted)]
        merged = iter(_merged(x, adapted, dtype))
        return [
            next(merged) if isinstance(kernel, Adapted) else _product(x, kernel, dtype) for kernel in kernels
        ]
    thins = iter(_thin(x, [kernel.a for kernel in kernels if isinstance(kernel, Adapted)]))

    def one(kernel):
        if not isinstance(kernel, Adapted):
            return _product(x, kernel, dtype)
        y = _product(x, kernel.base, dtype)
        if kernel.shrink is not None:
            y = (y * kernel.shrink).astype(y.dtype)  # bfloat16 has nothing between 1 and 1 - 1/256
        return y + _product(next(thins), kernel.b, dtype)

    return [one(kernel) for kernel in kernels]


def _product(x: Array, kernel: Array, dtype: Any) -> Array:
    return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=dtype)


def _thin(x: Array, factors: Sequence[Array]) -> list[Array]:
    """`x @ a` for each of several first factors, as one product."""
    ends = list(itertools.accumulate(a.shape[-1] for a in factors))
    if not factors:
        return []
    return jnp.split(x @ jnp.concatenate([a.astype(x.dtype) for a in factors], -1), ends[:-1], -1)


def _merging_pays(x: Array, kernels: Sequence[Array | Adapted]) -> bool:
    """Whether fewer bytes move with merged kernels: those of tokens outweigh those of kernels."""
    sides = [min(kernel.base.shape) for kernel in kernels if isinstance(kernel, Adapted)]
    return math.prod(x.shape[:-1]) > max(sides, default=math.inf)


_FEW = 16
"""Columns of a factor that a sum takes faster than a product does."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _merged(x: Array, kernels: list[Adapted], dtype: Any) -> list[Array]:
    """`x @ kernel` for adapted kernels, each merged for the product; gradients take thin products alone."""
    return [_product(x, _for_product(kernel, x.dtype), dtype) for kernel in kernels]


def _merged_forward(x, kernels, dtype):
    return _merged(x, kernels, dtype), (x, kernels)


def _merged_backward(dtype, kept, gradients):
    """Thin products for factors; XLA merges each kernel once, and drops what nobody asked the gradient of."""
    del dtype
    x, kernels = kept
    total, changes = jnp.zeros_like(x), []
    thins = _thin(x, [kernel.a for kernel in kernels])
    for kernel, thin, dy in zip(kernels, thins, gradients, strict=True):
        dy = dy.astype(x.dtype)
        total = total + dy @ _for_product(kernel, x.dtype).mT
        base = jnp.einsum("...tm,...tn->mn", x, dy).astype(kernel.base.dtype)
        b = jnp.einsum("...tr,...tn->rn", thin, dy).astype(kernel.b.dtype)
        a = jnp.einsum("...tm,...tr->mr", x, dy @ kernel.b.astype(x.dtype).mT).astype(kernel.a.dtype)
        shrink = kernel.shrink
        if shrink is not None:
            shrink, base = (base * kernel.base).sum().astype(shrink.dtype), base * shrink
        changes.append(Adapted(base, a, b, shrink))
    return total, changes


_merged.defvjp(_merged_forward, _merged_backward)


def _for_product(kernel: Adapted, dtype: Any) -> Array:
    """The merged kernel in the dtype of a product, from factors in that dtype."""
    merged = kernel.base if kernel.shrink is None else kernel.shrink * kernel.base
    a, b = kernel.a.astype(dtype), kernel.b.astype(dtype)
    if a.shape[-1] > _FEW:
        return (merged + (a @ b).astype(merged.dtype)).astype(dtype)
    for i in range(a.shape[-1]):  # one pass over the kernel: no product is written, and read again
        merged = merged + a[:, i, None].astype(merged.dtype) * b[None, i].astype(merged.dtype)
    return merged.astype(dtype)


def merge(kernel: Array | Adapted | LowRank) -> Array:
    """The dense matrix `[..., m, n]` that a kernel in any of its forms stands for, in full precision."""
    if not isinstance(kernel, Adapted | LowRank):
        return kernel
    product = jnp.matmul(kernel.a, kernel.b, precision=jax.lax.Precision.HIGHEST)
    if isinstance(kernel, LowRank):
        return product
    base = kernel.base if kernel.shrink is None else kernel.shrink[..., None, None] * kernel.base
    return base + product


def lora_factors(key: Array, shape: tuple[int, ...], rank: int, dtype) -> LoRA:
    """LoRA's initial factors: `a` uniform as `peft` draws it (Kaiming, a=sqrt(5)), `b` zero.

    Args:
      key: a PRNG key.
      shape: the kernel's shape `[..., m, n]`.
      rank: r.
      dtype: of both factors.

    Returns:
      `LoRA(a [..., m, r], b [..., r, n])` whose product is zero.

    References:
      Hu et al., LoRA (2106.09685); the uniform bound 1/sqrt(m) is peft's default [V2].
    """
    *stack, m, n = shape
    bound = m**-0.5
    # Drawn flat: a CPU compiles that ten times sooner, and the values are the same.
    a = jax.random.uniform(key, (math.prod(stack) * m * rank,), dtype, -bound, bound)
    return LoRA(a.reshape(*stack, m, rank), jnp.zeros((*stack, rank, n), dtype))
