"""Products with adapted kernels, and LoRA's initial factors.

The base product stays un-batched when `vmap` maps over clients' factors only (docs/design.md, F3), so an
adapter is never merged into its kernel inside a client; `merge` is for the server and for export.
"""

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

    def product(x, kernel):
        return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=dtype)

    def one(kernel, thin):
        if not isinstance(kernel, Adapted):
            return product(x, kernel)
        y = product(x, kernel.base)
        if kernel.shrink is not None:
            y = y * kernel.shrink.astype(y.dtype)
        return y + product(thin, kernel.b)

    adapted = {i: kernel.a.astype(x.dtype) for i, kernel in enumerate(kernels) if isinstance(kernel, Adapted)}
    ends = list(itertools.accumulate(a.shape[-1] for a in adapted.values()))
    thin = jnp.split(x @ jnp.concatenate([*adapted.values()], -1), ends[:-1], -1) if adapted else []
    thins = dict(zip(adapted, thin, strict=True))
    return [one(kernel, thins.get(i)) for i, kernel in enumerate(kernels)]


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
