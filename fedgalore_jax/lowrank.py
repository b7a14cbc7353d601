"""Orthonormal bases: Gram-Schmidt that survives rank deficiency, and leading singular subspaces.

The default path is matrix products only. Batched LAPACK calls in one program can hang jaxlib on a
CPU with few cores: finders that need LAPACK take one matrix after the other, under `vmap` too.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap

from fedgalore_jax.types import Array

FINDERS = ("svd", "gram", "subspace", "random")
# Few numbers, used for many steps: products in TF32 or bfloat16 would save nothing.
_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def orthonormalise(y: Array, key: Array) -> Array:
    """Gram-Schmidt of matrix products only, orthonormal for any input.

    A column that depends on those before it, or is zero or not finite, is replaced by what remains
    of a random one (Cholesky-QR would return NaN).

    Args:
      y: `[..., m, r]` with r <= m.
      key: a PRNG key, of the replacements alone.

    Returns:
      `[..., m, r]` in float32 (float64 if y is); the first j columns span what those of y span.

    Raises:
      ValueError: r > m.

    References:
      Giraud et al., The loss of orthogonality in the Gram-Schmidt process, 2005: twice is enough.
    """
    m, r = y.shape[-2:]
    _check_rank(r, m)
    dtype = jnp.promote_types(y.dtype, jnp.float32)
    random = _normal(key, y.shape, dtype)
    pairs = _scaled(jnp.stack([y.astype(dtype), random], -1), axis=-3)  # [..., m, r, 2]
    negligible = 100 * jnp.finfo(dtype).eps

    def step(j, basis):
        pair = jax.lax.dynamic_index_in_dim(pairs, j, pairs.ndim - 2, keepdims=False)  # [..., m, 2]
        before = jnp.linalg.norm(pair, axis=-2, keepdims=True)
        for _ in range(2):
            # Sums of products, since a GPU's libraries are slow at so few columns.
            overlap = (basis[..., None] * pair[..., None, :]).sum(-3)  # [..., r, 2]
            pair = pair - (basis[..., None] * overlap[..., None, :, :]).sum(-2)
        after = jnp.linalg.norm(pair, axis=-2, keepdims=True)
        independent = after > negligible * before  # False for NaN as well
        column = jnp.where(independent[..., :1], pair[..., :1], pair[..., 1:])
        column = column / jnp.linalg.norm(column, axis=-2, keepdims=True)
        return jax.lax.dynamic_update_slice_in_dim(basis, column, j, axis=basis.ndim - 1)

    return jax.lax.fori_loop(0, r, step, jnp.zeros(y.shape, dtype))


@functools.partial(jax.jit, static_argnames=("shape", "rank", "dtype"))
def random_basis(key: Array, shape: tuple[int, ...], rank: int, dtype=jnp.float32) -> Array:
    """A uniformly distributed orthonormal basis `[..., m, r]`, a function of the key alone.

    Args:
      key: a PRNG key.
      shape: `(..., m)`, stack axes and the dimension of the space.
      rank: r, from 1 to m.
      dtype: float32 or float64.

    Raises:
      ValueError: rank outside 1 to m.
    """
    _check_rank(rank, shape[-1])
    # Gaussian columns are independent: the replacements can be the same draw, which compiles once.
    return orthonormalise(_normal(key, (*shape, rank), dtype), key)


def fix_signs(basis: Array) -> Array:
    """Flips columns of `[..., m, r]` so that the largest-magnitude entry of each is positive.

    Signs of singular vectors are arbitrary, but a first moment outlives the basis it was made in.
    """
    peak = jnp.take_along_axis(basis, jnp.argmax(abs(basis), -2, keepdims=True), -2)
    return jnp.where(peak < 0, -basis, basis)


@functools.partial(jax.jit, static_argnames=("rank", "finder", "passes"))
def leading_subspace(
    matrix: Array, rank: int, *, finder: str = "subspace", key: Array, passes: int = 3
) -> Array:
    """An orthonormal basis of the leading left singular subspace.

    Args:
      matrix: `[..., m, n]`; use `matrix.mT` for the right singular subspace.
      rank: r, from 1 to m. Beyond the matrix's own rank the columns are arbitrary.
      finder: one of `FINDERS`. 'svd' is the reference, 'gram' is `eigh` of the smaller Gram matrix:
        columns by descending singular value. 'subspace' is subspace iteration from a random start: the
        same space as far as there is a gap after the r-th singular value; its columns tend to the
        singular vectors in order, but are not rotated to them (Rayleigh-Ritz would need LAPACK).
        'random' looks only at the shape. A GPU or TPU reads float32 matrices in bfloat16 for 'subspace'.
      key: a PRNG key; 'svd' ignores it.
      passes: of subspace iteration, two readings of the matrix each. The error falls as the power
        `2 * passes` of the gap (§4.5).

    Returns:
      `[..., m, r]` in float32 (float64 if the matrix is), orthonormal ('svd' and 'gram': for finite
      input), with the signs of `fix_signs` ('random': as drawn).

    Raises:
      ValueError: an unknown finder, or a rank outside 1 to m.

    References:
      Halko, Martinsson & Tropp, Finding structure with randomness (0909.4061), algorithm 4.4.
    """
    *stack, m, n = matrix.shape
    _check_rank(rank, m)
    dtype = jnp.promote_types(matrix.dtype, jnp.float32)
    if finder == "random":
        return random_basis(key, (*stack, m), rank, dtype)
    g = matrix.astype(dtype)
    if finder == "subspace":
        halved = _halved(g)

        def iterate(_, basis):
            # The thin product is scaled, not the matrix: nothing of its size is written.
            thin = _scaled(_thin(halved, basis, transposed=True), axis=(-2, -1))
            return orthonormalise(_thin(halved, thin), key)

        # One loop and one draw: compiling them is what a model of a hundred kernels waits for.
        start = _normal(key, (*stack, m, rank), dtype)
        basis = jax.lax.fori_loop(0, passes, iterate, start)
    elif finder == "svd":
        basis = _one_by_one(lambda a: jnp.linalg.svd(a, rank > n)[0], g)[..., :rank]
    elif finder == "gram":
        g = _scaled(g, axis=(-2, -1))
        gram = _matmul(g, g.mT) if m <= n else _matmul(g.mT, g)
        basis = _one_by_one(lambda a: jnp.linalg.eigh(a)[1], gram)[..., ::-1][..., :rank]
        if m > n:  # right singular vectors: lift them, and fill up beyond the n there are
            missing = [(0, 0)] * (g.ndim - 1) + [(0, max(rank - n, 0))]
            basis = orthonormalise(jnp.pad(_matmul(g, basis), missing), key)
    else:
        raise ValueError(f"finder={finder!r} is unknown: choose one of {', '.join(FINDERS)}")
    return fix_signs(basis)


@functools.partial(jax.jit, static_argnames=("rank",))
def factored_svd(a: Array, b: Array, rank: int) -> tuple[Array, Array, Array]:
    """The truncated SVD of `a @ b` without the product: O((m + n) k^2 + k^3) for each matrix.

    Args:
      a: `[..., m, k]`.
      b: `[..., k, n]`.
      rank: how many singular triples; beyond k (or m, or n) they are zero.

    Returns:
      `(u [..., m, rank], s [..., rank], vt [..., rank, n])` by descending singular value, in float32 (or
      float64), with the signs of `fix_signs` in `u`.
    """
    dtype = jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)
    qa, ra = _one_by_one(lambda x: jnp.linalg.qr(x), a.astype(dtype))
    qb, rb = _one_by_one(lambda x: jnp.linalg.qr(x), b.astype(dtype).mT)
    u, s, vt = _one_by_one(lambda core: jnp.linalg.svd(core, full_matrices=False), _matmul(ra, rb.mT))
    lifted = _matmul(qa, u)
    u = fix_signs(lifted)
    vt = _matmul(vt, qb.mT) * jnp.where((u == lifted).all(-2), 1, -1).astype(dtype)[..., None]
    missing = max(rank - s.shape[-1], 0)
    stack = [(0, 0)] * (s.ndim - 1)
    u = jnp.pad(u[..., :rank], [*stack, (0, 0), (0, missing)])
    return (
        u,
        jnp.pad(s[..., :rank], [*stack, (0, missing)]),
        jnp.pad(vt[..., :rank, :], [*stack, (0, missing), (0, 0)]),
    )


def ridge(gram: Array, rhs: Array, weight: float) -> Array:
    """`(gram + weight I)^-1 rhs` for small positive semidefinite `gram [..., r, r]`, `rhs [..., r, n]`."""
    damped = gram + weight * jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
    return _one_by_one(jnp.linalg.solve, damped, rhs)


def _normal(key, shape, dtype):
    """Standard normal numbers, drawn flat: a CPU compiles that ten times sooner, values are the same."""
    return jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape)


def _one_by_one(decompose, *matrices):
    """Applies a LAPACK call to `[..., a, b]` in a loop, which `vmap` only makes longer."""
    decompose = sequential_vmap(decompose)
    for _ in matrices[0].shape[:-2]:
        decompose = jax.vmap(decompose)
    return decompose(*matrices)


def _scaled(x, axis):
    """Largest magnitude 1 (zero stays zero): squares and products stay inside float32."""
    peak = jnp.max(abs(x), axis, keepdims=True)
    return x / jnp.where(peak == 0, 1, peak)


def _check_rank(rank, m):
    if not 1 <= rank <= m:
        raise ValueError(f"rank={rank} does not fit a space of dimension {m}: choose 1 to {m}")


def _halved(matrix):
    """A matrix that directions are searched in: a GPU or TPU reads it in bfloat16, which is half the bytes.

    That changes nothing in a gradient of products in bfloat16, and else less than its noise.
    """
    on_cpu = jax.default_backend() == "cpu"
    return matrix if on_cpu or matrix.dtype != jnp.float32 else matrix.astype(jnp.bfloat16)


def _thin(matrix, columns, *, transposed=False):
    """A matrix, or its transpose, times few columns, of which a halved one meets 16 bits, in two parts."""
    axes = "...mn,...mr->...nr" if transposed else "...mn,...nr->...mr"
    if matrix.dtype != jnp.bfloat16:
        return jnp.einsum(axes, matrix, columns, precision=jax.lax.Precision.HIGHEST)
    # Not by casts there and back, which XLA takes away.
    high = jax.lax.reduce_precision(columns, exponent_bits=8, mantissa_bits=7)
    pair = jnp.concatenate([high, columns - high], -1).astype(jnp.bfloat16)
    first, second = jnp.split(jnp.einsum(axes, matrix, pair, preferred_element_type=columns.dtype), 2, -1)
    return first + second
