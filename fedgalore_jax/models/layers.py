"""Layers that every transformer family here is made of. Kernels are in x out."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fedgalore_jax import adapters, tree
from fedgalore_jax.types import Array


def gelu(x: Array) -> Array:
    """GELU with the error function; `erf` is cheaper on a CPU than the `erfc` of `jax.nn.gelu`."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


# Computed again for the backward pass: keeping the input alone is cheaper than keeping each term.
_again = functools.partial(jax.checkpoint, prevent_cse=False)
_gelu_tanh = _again(functools.partial(jax.nn.gelu, approximate=True))
ACTIVATIONS = {
    "gelu": _again(gelu),
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": jax.nn.relu,
    "silu": _again(jax.nn.silu),
}
"""By Hugging Face's `hidden_act`."""


def normal(key: Array, shape: tuple[int, ...]) -> Array:
    """Standard normal numbers. Drawn flat, as in `dropout`: a CPU compiles that ten times sooner."""
    return jax.random.normal(key, (math.prod(shape),)).reshape(shape)


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zeroes a share `rate` of `x` and scales up the rest; without a key, `x` as it is."""
    if key is None or rate == 0:
        return x
    # 16 random bits an element decide as well as the 32 of `bernoulli`, at half the cost.
    bits = jax.random.bits(key, (x.size,), jnp.uint16).reshape(x.shape)
    return jnp.where(bits >= min(round(rate * 2**16), 2**16 - 1), x / (1 - rate), 0)


def _along(vector: Array, x: Array) -> Array:
    """A `[D]` vector as `[..., D]` like `x`, in its dtype: ranks are never promoted silently."""
    return jnp.broadcast_to(vector.astype(x.dtype), x.shape)


class Linear(nnx.Module):
    """`x @ kernel + bias`: the one place where a kernel meets its adapter.

    Parameters: `kernel [m, n]`, or an `Adapted` of that shape, and `bias [n]`.
    """

    def __init__(self, m: int, n: int, *, std: float, bias: bool = True, rngs: nnx.Rngs):
        self.kernel = nnx.Param(std * normal(rngs.params(), (m, n)))
        self.bias = nnx.Param(jnp.zeros(n)) if bias else None

    def __call__(self, x: Array, dtype: Any = None) -> Array:
        """`[..., m]` to `[..., n]`, in `dtype` or that of `x`."""
        return together(x, self, dtype=dtype)[0]


def together(x: Array, *linears: Linear, dtype: Any = None) -> list[Array]:
    """What each of several `Linear`s makes of the same `x`, with the thin products of adapters shared."""
    # One token axis: a kernel's gradient under vmap then contracts a single axis, which saves
    # XLA's CPU backend a transposed copy (a quarter of a whole local step of a small ViT).
    kernels = [linear.kernel.get_value() for linear in linears]
    products = adapters.matmuls(x.reshape(-1, x.shape[-1]), kernels, dtype)
    products = [y.reshape(*x.shape[:-1], y.shape[-1]) for y in products]
    return [
        y if linear.bias is None else y + _along(linear.bias.get_value(), y)
        for y, linear in zip(products, linears, strict=True)
    ]


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis; statistics in float32 or wider.

    Parameters: `scale [D]` and `bias [D]`.
    """

    def __init__(self, width: int, *, eps: float, rngs: nnx.Rngs | None = None):
        del rngs  # nothing is drawn
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        """`[..., D]` to the same shape and dtype."""
        wide = tree.wide(x)
        centred = wide - wide.mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)
        y = y * _along(self.scale.get_value(), y) + _along(self.bias.get_value(), y)
        return y.astype(x.dtype)


class RMSNorm(nnx.Module):
    """Division by the root mean square over the last axis; statistics in float32 or wider.

    Parameters: `scale [D]`.
    """

    def __init__(self, width: int, *, eps: float, rngs: nnx.Rngs | None = None):
        del rngs  # nothing is drawn
        self.scale = nnx.Param(jnp.ones(width))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        """`[..., D]` to the same shape and dtype."""
        wide = tree.wide(x)
        y = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        return (y * _along(self.scale.get_value(), y)).astype(x.dtype)


def attend(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Array | None = None,
    causal: bool = False,
    rate: float = 0,
    key: Array | None = None,
) -> Array:
    """Softmax attention with dropout on the probabilities; the softmax is in float32 or wider.

    Args:
      q: `[B, L, H, d]`.
      k: `[B, M, K, d]`, where H is a multiple of K: queries in groups share a key.
      v: `[B, M, K, d]`.
      mask: `[B, M]` booleans, False for padding: a key that no query sees. None sees all.
      causal: query i sees the keys up to i only.
      rate: dropout on the probabilities.
      key: None turns dropout off.

    Returns:
      `[B, L, H, d]`.
    """
    batch, length, heads, d = q.shape
    if _fused(q, k) and (key is None or rate == 0):
        return _attend_fused(q, k, v, mask, causal)
    # Heads first, in so many words: a CPU takes twice as long over products of strided arrays. The queries
    # of a group stand below each other, so that a key's head is one product.
    q = jnp.moveaxis((q * d**-0.5).reshape(batch, length, k.shape[2], -1, d), 1, 3)
    k, v = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
    groups = q.shape[:4]
    scores = (q.reshape(*groups[:2], -1, d) @ jnp.swapaxes(k, -1, -2)).reshape(*groups, -1)
    scores = scores.astype(jnp.promote_types(q.dtype, jnp.float32))
    # Finite, so that a row of padding alone gives a mean and not NaN.
    hidden = jnp.finfo(scores.dtype).min
    if mask is not None:
        scores = jnp.where(mask[:, None, None, None], scores, hidden)
    if causal:
        scores = jnp.where(jnp.tri(*scores.shape[-2:], dtype=bool)[None, None, None], scores, hidden)
    probs = dropout(jax.nn.softmax(scores).astype(q.dtype), rate, key)
    mixed = (probs.reshape(*groups[:2], -1, probs.shape[-1]) @ v).reshape(*groups, d)
    return jnp.moveaxis(mixed, 3, 1).reshape(batch, length, heads, d)


def _fused(q: Array, k: Array) -> bool:
    """Whether there is a fused kernel for these arrays: cuDNN's, for half precision and 64 tokens or more.

    Decided while tracing. `jax.nn.dot_product_attention` picks no kernel by itself, and without one
    it does what `attend` does: on a CPU up to a twentieth slower, and in float32 even for float64.
    """
    long, whole = min(q.shape[1], k.shape[1]) >= 64, q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    return long and whole and q.dtype in (jnp.bfloat16, jnp.float16) and jax.default_backend() == "gpu"


def _attend_fused(q: Array, k: Array, v: Array, mask: Array | None, causal: bool) -> Array:
    """`attend` by cuDNN, which takes even lengths only: an odd one gets a place that nobody sees."""
    (batch, length, heads, _), keys = q.shape, k.shape[1]
    query_lengths = key_lengths = None
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    if mask is not None:  # in full: the kernel's rule for vmap broadcasts nothing
        mask = jnp.pad(mask, ((0, 0), (0, keys % 2)))[:, None, None]
        mask = jnp.broadcast_to(mask, (batch, heads, q.shape[1], k.shape[1]))
    elif length % 2 or keys % 2:
        own = 0 * q[:, 0, 0, 0].astype(jnp.int32)  # batched where the queries are, for the same reason
        query_lengths, key_lengths = length + own, keys + own
    mixed = jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=mask,
        is_causal=causal,
        query_seq_lengths=query_lengths,
        key_value_seq_lengths=key_lengths,
        implementation="cudnn",
    )
    return mixed[:, :length]


class Attention(nnx.Module):
    """Multi-head attention with separate query, key and value kernels, as Hugging Face keeps them.

    Parameters: `query`, `key`, `value` and `output`, each a `Linear` of `[D, D]`.
    """

    def __init__(self, width: int, heads: int, *, rate: float, std: float, qkv_bias: bool, rngs: nnx.Rngs):
        linear = functools.partial(Linear, width, width, std=std, rngs=rngs)
        self.query, self.key, self.value = (linear(bias=qkv_bias) for _ in range(3))
        self.output = linear()
        self.heads, self.rate = heads, rate

    def __call__(self, x: Array, mask: Array | None = None, *, key: Array | None = None) -> Array:
        """`[B, L, D]` to the same shape; `mask [B, L]` is False for padding."""
        heads = (*x.shape[:-1], self.heads, -1)
        q, k, v = (y.reshape(heads) for y in together(x, self.query, self.key, self.value))
        return self.output(attend(q, k, v, mask=mask, rate=self.rate, key=key).reshape(x.shape))
