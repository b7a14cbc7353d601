"""What clients' blocks have in common (AJIVE), and how a server syncs second moments with it.

`ajive` has static shapes and no randomness: it runs inside jit and vmap. `synchronise` adds the
policy: weights, clamp, fallback. Marks: [V] read in the source itself, [I] our own. C clients,
d rows of a block (the rank of a projected moment), n the shared axis, s the signal rank.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap

from fedgalore_jax.lowrank import fix_signs
from fedgalore_jax.types import Array

METHODS = ("mean", "median", "ajive")
SLACK = 1e-4  # of every comparison, relative: above float32 rounding, below any real signal


class SharedSignal(NamedTuple):
    """The joint part of several blocks.

    Attributes:
      joint: `[C, d, n]`, the participants' blocks projected on the joint row space; zero elsewhere.
      basis: `[n, s]`, aligned with `spectrum`; columns orthonormal if joint, zero if not.
      rank: `[]` int32, the number of joint directions; 0 if there are none.
      spectrum: `[s]`, descending, in `[0, C]`: squared singular values of the stacked signals.
    """

    joint: Array
    basis: Array
    rank: Array
    spectrum: Array


def ajive(
    blocks: Array, signal_rank: int, *, joint_rank: int | None = None, weights: Array | None = None
) -> SharedSignal:
    """Extracts the row space that all blocks share, and each block's part in it.

    A block's signal is its first s right singular vectors. A direction of the stacked signals is
    joint if its squared singular value exceeds what chance (random-direction cut) and noise (Wedin
    cut) explain, and every participant holds it above `(sigma_s + sigma_{s+1}) / 2` [V]. Unlike the
    reference [I], both cuts are closed forms (the edge of a free sum of projections; the ratio
    `sigma_{s+1} / sigma_s`, which bounds every resampled one and so is lenient), signals below
    rounding are left out, comparisons have a slack of 1e-4, and nothing is centred.

    Args:
      blocks: `[C, d, n]`; computed in float32, or float64 if given.
      signal_rank: s, in 1..min(d - 1, n); s <= d / 2 is advisable.
      joint_rank: None to decide by the cuts, or how many leading directions to take unfiltered, in
        0..s (fewer where the signals span fewer; where clients agree, below s the choice is a tie).
      weights: `[C]`, a mask: positive takes part, all do if None. Nothing of the others is used.

    Returns:
      A `SharedSignal`. A single participant shares with nobody: rank 0 by the cuts.

    Raises:
      ValueError: `blocks` or `weights` of another shape, or a rank outside its range.

    References:
      Feng et al., Angle-based joint and individual variation explained (1704.02060) [V].
    """
    if blocks.ndim != 3:
        raise ValueError(f"blocks must be [C, d, n], not {list(blocks.shape)}: stack the clients")
    clients, d, n, s = *blocks.shape, signal_rank
    if not 1 <= signal_rank <= min(d - 1, n):
        fit = f"1..{min(d - 1, n)}, which needs d >= 2 rows, for {d} x {n} blocks"
        raise ValueError(f"signal_rank={signal_rank} does not fit: choose from {fit}")
    if joint_rank is not None and not 0 <= joint_rank <= signal_rank:
        raise ValueError(f"joint_rank={joint_rank} does not fit: choose 0..{signal_rank} or None")
    blocks, present = _participants(blocks, jnp.ones(clients) if weights is None else weights)
    # Moments may be 1e-20: unit peaks keep every square in range and change no angle.
    peak = jnp.max(abs(blocks), (1, 2), keepdims=True)
    unit = blocks / jnp.maximum(peak, jnp.finfo(peak.dtype).tiny)
    # Accelerators round float32 products to far fewer bits unless told not to.
    with jax.default_matmul_precision("highest"):
        frames, sigma = _signal_frames(unit, s)
        stacked = frames.reshape(clients * s, n)
        values, mix = _eigh(stacked @ stacked.T)
        spectrum = jnp.maximum(values[::-1][:s], 0)
        # Only values above 1 are ever judged joint, so the Gram matrix costs no accuracy here.
        basis = stacked.T @ mix[:, ::-1][:, :s] / jnp.sqrt(jnp.maximum(spectrum, SLACK))[None]
        if joint_rank is None:
            threshold = (1 - SLACK) * jnp.mean(sigma[:, -2:], axis=1, keepdims=True)
            held = (jnp.linalg.norm(unit @ basis, axis=1) >= threshold) | ~present[:, None]
            kept = (spectrum > _cut(sigma, present, n)) & jnp.all(held, axis=0)
        else:
            kept = (spectrum > SLACK) & (jnp.arange(s) < joint_rank)
        basis = fix_signs(jnp.where(kept[None], basis, 0))
        joint = peak * ((unit @ basis) @ basis.T)
    return SharedSignal(joint, basis, jnp.sum(kept, dtype=jnp.int32), spectrum)


def synchronise(
    moments: Array,
    weights: Array,
    *,
    method: str,
    signal_rank: int,
    joint_rank: int | None = None,
    floor: float = 1e-3,
    each_layer: Callable = jax.vmap,
) -> tuple[Array, Array]:
    """Makes one second moment of the clients'.

    'mean' is weighted, 'median' element-wise over participants and unweighted. 'ajive' projects the
    weighted mean on the joint row space (the weighted mean of the joint parts) and raises what is
    below `floor` times the mean's column mean, as a projection may be negative; where the joint
    rank is 0 it is the weighted mean, untouched.

    Args:
      moments: `[C, ..., d, n]`, non-negative; middle axes are layers, each synced by itself.
      weights: `[C]`, summing to 1 over participants, 0 for the others.
      method: one of `METHODS`.
      signal_rank: as in `ajive`; unused by the other methods, as is `joint_rank`.
      joint_rank: as in `ajive`.
      floor: at least 0.
      each_layer: what maps AJIVE over the layers, called as `jax.vmap(function, axis)`.

    Returns:
      Moments `[..., d, n]` in float32 or wider (zero if nobody takes part), and int32 joint ranks
      `[...]`: 0 where 'ajive' fell back to the mean, -1 for the methods that have none.

    Raises:
      ValueError: an unknown method, arrays that do not fit, a negative floor, a rank out of range.

    References:
      FedGaLore (2602.01746): the server extracts the shared signal of projected second moments [V].
      Its clamp, fallback and use of the weights were not read: these are ours [I].
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown: choose one of {', '.join(METHODS)}")
    if moments.ndim < 3 or floor < 0:
        raise ValueError(f"need moments [C, ..., d, n], floor >= 0: not {moments.shape}, {floor=}")
    clients, *layers, d, n = moments.shape
    no_rank = jnp.full(layers, -1, jnp.int32)
    if method == "median":
        moments, present = _participants(moments, weights, absent=jnp.inf)
        ordered, count = jnp.sort(moments, axis=0), jnp.sum(present)  # the absent come last
        middle = (ordered[jnp.maximum(count - 1, 0) // 2] + ordered[count // 2]) / 2
        return jnp.where(count > 0, middle, 0), no_rank
    moments, present = _participants(moments, weights)
    with jax.default_matmul_precision("highest"):
        mean = jnp.tensordot(jnp.asarray(weights, moments.dtype), moments, 1)
        if method == "mean":
            return mean, no_rank
        shared = each_layer(
            lambda blocks: ajive(blocks, signal_rank, joint_rank=joint_rank, weights=present), 1
        )(moments.reshape(clients, -1, d, n))
        basis, rank = shared.basis.reshape(*layers, n, signal_rank), shared.rank.reshape(layers)
        joint = (mean @ basis) @ basis.mT
    clamped = jnp.maximum(joint, floor * jnp.mean(mean, axis=-2, keepdims=True))
    return jnp.where((rank > 0)[..., None, None], clamped, mean), rank


def _participants(rows, weights, absent=0.0):
    """Rows `[C, ...]` in float32 or wider with the absent ones blotted out, and the mask `[C]`."""
    present = jnp.asarray(weights) > 0
    if present.shape != rows.shape[:1]:
        raise ValueError(f"{len(rows)} clients need as many weights, not {list(present.shape)}")
    mask = present.reshape(-1, *(1 for _ in rows.shape[1:]))
    rows = rows.astype(jnp.promote_types(rows.dtype, jnp.float32))
    return jnp.where(mask, rows, absent), present


def _signal_frames(blocks, s):
    """Orthonormal rows `[C, s, n]` that span the signals, and singular values `[C, s + 1]`.

    Whitening twice and `eigh` of `[[0, R], [R^T, 0]]` (eigenvalues +-sigma) are as accurate as an
    SVD (one Gram matrix loses what is below sqrt(eps)) with nothing but products on the long axis.
    """
    d, eps = blocks.shape[1], jnp.finfo(blocks.dtype).eps
    # The first pass cannot judge what is below sqrt(eps): it only scales that, the second judges.
    outer = _whiten(_whiten(blocks, -1), 8 * d * eps)
    corner = jnp.pad(outer @ blocks.mT, ((0, 0), (0, d), (d, 0)))
    values, vectors = jax.vmap(_eigh)(corner + corner.mT)
    sigma = values[:, ::-1][:, : s + 1]
    # What is below rounding is arbitrary, and may even be the same for all clients: not a signal.
    sigma = jnp.where(sigma > 8 * d * eps * sigma[:, :1], sigma, 0)
    inner = jnp.where(sigma[:, None, :s] > 0, vectors[:, :d, ::-1][:, :, :s], 0)
    return _whiten(inner.mT @ outer, 8 * d * eps), sigma


def _whiten(rows, negligible):
    """Orthonormal rows that span those of `[C, d, n]`; zero where the Gram matrix has nothing."""
    values, vectors = jax.vmap(_eigh)(rows @ rows.mT)
    values, largest, info = values[:, :, None], values[:, -1:, None], jnp.finfo(rows.dtype)
    white = vectors.mT @ rows / jnp.sqrt(jnp.maximum(values, info.eps * largest + info.tiny))
    return jnp.where(values > negligible * largest, white, 0)


def _eigh(matrix):
    """`eigh` that batches as a loop on CPUs, where batched LAPACK in one program can deadlock."""

    def one(matrix):
        return tuple(jnp.linalg.eigh(matrix))

    return jax.lax.platform_dependent(matrix, cpu=sequential_vmap(one), default=one)


def _cut(sigma, present, n):
    """What the squared singular value of a joint direction exceeds."""
    count = jnp.sum(present, dtype=sigma.dtype)
    # From a share of 1 - 1/count on, random subspaces intersect: the edge stays at count.
    share = jnp.minimum((sigma.shape[1] - 1) / n, 1 - 1 / jnp.maximum(count, 1))
    chance = 1 + (count - 2) * share + 2 * jnp.sqrt((count - 1) * share * (1 - share))
    last, rest = sigma[:, -2], sigma[:, -1]
    ratio = rest / jnp.maximum(last, jnp.finfo(last.dtype).tiny)
    wedin = jnp.sum(jnp.where(present & (last > 0), 1 - jnp.maximum(ratio**2, SLACK), 0))
    return jnp.maximum(chance * (1 + SLACK), wedin)
