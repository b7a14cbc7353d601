"""Layers that every transformer family here is made of. Kernels are in x out."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from fedgalore_jax import adapters
from fedgalore_jax.types import Array


def gelu(x: Array) -> Array:
    """GELU with the error function; `erf` is cheaper on a CPU than the `erfc` of `jax.nn.gelu`."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)
ACTIVATIONS = {
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
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

    def __call__(self, x: Array) -> Array:
        """`[..., m]` to `[..., n]`."""
        # One token axis: a kernel's gradient under vmap then contracts a single axis, which saves
        # XLA's CPU backend a transposed copy (a quarter of a whole local step of a small ViT).
        y = adapters.matmul(x.reshape(-1, x.shape[-1]), self.kernel.get_value())
        y = y.reshape(*x.shape[:-1], y.shape[-1])
        return y if self.bias is None else y + _along(self.bias.get_value(), y)


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
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        centred = wide - wide.mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)
        y = y * _along(self.scale.get_value(), y) + _along(self.bias.get_value(), y)
        return y.astype(x.dtype)


def attend(q: Array, k: Array, v: Array, *, rate: float = 0, key: Array | None) -> Array:
    """Softmax attention with dropout on the probabilities.

    Args:
      q: `[B, L, H, d]`.
      k: `[B, M, H, d]`.
      v: `[B, M, H, d]`.
      rate: dropout on the probabilities.
      key: None turns dropout off.

    Returns:
      `[B, L, H, d]`.
    """
    scores = jnp.einsum("blhd,bmhd->bhlm", q * q.shape[-1] ** -0.5, k)
    scores = scores.astype(jnp.promote_types(q.dtype, jnp.float32))
    probs = dropout(jax.nn.softmax(scores).astype(q.dtype), rate, key)
    return jnp.einsum("bhlm,bmhd->blhd", probs, v)


class Attention(nnx.Module):
    """Multi-head attention with separate query, key and value kernels, as Hugging Face keeps them.

    Parameters: `query`, `key`, `value` and `output`, each a `Linear` of `[D, D]`.
    """

    def __init__(self, width: int, heads: int, *, rate: float, std: float, qkv_bias: bool, rngs: nnx.Rngs):
        linear = functools.partial(Linear, width, width, std=std, rngs=rngs)
        self.query, self.key, self.value = (linear(bias=qkv_bias) for _ in range(3))
        self.output = linear()
        self.heads, self.rate = heads, rate

    def __call__(self, x: Array, *, key: Array | None = None) -> Array:
        """`[B, L, D]` to the same shape."""
        heads = (*x.shape[:-1], self.heads, -1)
        q, k, v = (p(x).reshape(heads) for p in (self.query, self.key, self.value))
        return self.output(attend(q, k, v, rate=self.rate, key=key).reshape(x.shape))
