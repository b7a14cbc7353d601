"""The dimension legend and the few types that every floor of the library shares.

Dimensions, used in comments and docstrings everywhere:

    C  clients in this round (the cohort)      B  batch size
    N  clients in all                          L  sequence length, or stacked layers
    K  local steps a round                     D  model width      H  heads
    m  input side of a kernel                  r  rank
    n  output side of a kernel                 kernel = m x n ("in x out", as Flax stores it)

A kernel may have leading stack axes (`[..., m, n]`): scanned layers keep one array for all layers.
"""

from typing import Any, NamedTuple

import jax

Array = jax.Array
Tree = Any
"""Any pytree."""
Params = dict[str, Any]
"""A model's parameters: nested dicts of arrays, as `ModelFns.init` makes them."""
Flat = dict[str, Any]
"""The same leaves keyed by their path, `{"layers/attention/query/kernel": ...}`."""
Batch = dict[str, Array]
"""Model inputs by their Hugging Face names, plus `labels [B]` and `weight [B]` (0 for padding)."""


class LoRA(NamedTuple):
    """LoRA's two trained factors: two arrays, each with a gradient, a moment and a mean of its own.

    Attributes:
      a: `[..., m, r]`.
      b: `[..., r, n]`.
    """

    a: Array
    b: Array


class LowRank(NamedTuple):
    """One matrix kept as its two factors: `a @ b`; its mean over clients is the mean of products.

    Attributes:
      a: `[..., m, r]`.
      b: `[..., r, n]`.
    """

    a: Array
    b: Array


class Adapted(NamedTuple):
    """A frozen kernel with a low-rank correction: the matrix `shrink * base + a @ b`.

    One slot serves every low-rank method: LoRA (a and b trained), FFA-LoRA (b trained) and GaLore
    between two refreshes (one factor is the frozen orthonormal basis).

    Attributes:
      base: `[..., m, n]`, never batched over clients.
      a: `[..., m, r]`.
      b: `[..., r, n]`; a method's scale (LoRA's alpha / r) is already multiplied in.
      shrink: `[...]` (the stack axes), the product of `1 - lr * weight_decay` over the steps taken,
        or None where the base does not decay.
    """

    base: Array
    a: Array
    b: Array
    shrink: Array | None = None
