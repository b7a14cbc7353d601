"""How the uploads of a round become one: a weighted mean, or what withstands some that are wild.

Pure functions over stacked uploads `[C, ...]` and a mask `[C]` of who is present. A client whose upload is
not finite is never present (`engine.Engine.round`); these are for uploads that are finite and wrong. The lane
`mean` becomes what stands for a mean, the lane `sum` the same without weights, times the clients present; in
the lane `stack` rows stay rows, but none reaches further than what was kept.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedgalore_jax import tree
from fedgalore_jax.strategies.base import Upload
from fedgalore_jax.types import Array, LowRank, Tree

TRIM = 0.3
"""Share of the clients that `trimmed_mean` drops at each end."""


class Aggregator(NamedTuple):
    """What is done with the uploads of a round.

    Attributes:
      reduce: `(rows, weights, present) -> Upload`, of all uploads `[C, ...]`. None adds them up as chunks of
        clients finish, and there are never C copies.
      clip: global norm that a client's change is scaled down to, and then every client counts the same; None
        for weights by sample counts and no bound.
      noise: standard deviation, in multiples of `clip`, of what is added to the sum of changes.
    """

    reduce: Callable[[Upload, Array, Array], Upload] | None = None
    clip: float | None = None
    noise: float = 0.0

    @property
    def private(self) -> bool:
        """Whether a client's part in the model is bounded and hidden by noise."""
        return self.clip is not None

    def weights(self, counts: Array, size: Array) -> Array:
        """The clients' weights `[C]`: by their sample counts (0 for who is absent), or 1 / C each."""
        return (counts > 0) / size if self.private else counts / jnp.maximum(counts.sum(), 1)

    def shares(self, counts: Array, samples: int, num_clients: int) -> Array:
        """What each client `[C]` weighs in a mean over all N: by its sample counts, of all samples.

        Where entries are compared, 1 / N each: weights inside of them would be compared as well.
        """
        if self.reduce is not None:
            return (counts > 0).astype(float) / num_clients
        return counts.astype(float) / samples

    def arrive(self, rows: Upload, weights: Array, present: Array) -> tuple[Tree, Upload]:
        """What a chunk of clients adds to the total, and which of their rows are kept."""
        if self.reduce is not None:
            return (), rows
        if self.clip is not None:
            rows = rows._replace(mean=clipped(_changes_only(rows), self.clip))
        return _added(rows.mean, rows.sum, weights, present), Upload(stack=rows.stack)

    def upload(
        self, total: Tree, rows: Upload, counts: Array, present: Array, size: Array, key: Any
    ) -> Upload:
        """The round's upload, from what `arrive` left.

        Args:
          total: sum over chunks.
          rows: `[C, ...]`, of all clients.
          counts: `[C]`, samples of the clients that took part.
          present: `[C]`, those of them whose upload is used.
          size: clients of the round, absent ones too.
          key: of the noise, None where there is none.
        """
        left = jnp.where(present, counts, 0)
        if self.reduce is not None:
            return self.reduce(rows, self.weights(left, size), present)
        mean, summed = total
        if self.clip is not None:
            mean = with_noise(mean, key, self.noise * self.clip / size)
        else:  # exactly 1 where all are present
            grown = counts.sum() / jnp.maximum(left.sum(), 1)
            mean = jax.tree.map(lambda x: x * grown.astype(x.dtype), mean)
        return Upload(mean, summed, rows.stack)


MEAN = Aggregator()
"""Sums, as every method's authors mean it."""


def build(name: str, trim: float | None = None) -> Aggregator:
    """The aggregator of a name.

    Args:
      name: "mean"; "median" or "trimmed_mean", entry by entry and without weights, which no minority can move
        beyond what others sent; "norm_clip", the weighted mean of uploads that are scaled down to the median
        of their norms, which bounds how far a client moves the model, not where to.
      trim: of "trimmed_mean", the share of the clients dropped at each end, below 1/2; `TRIM` if None.

    References:
      median, trimmed mean: Yin et al., Byzantine-robust distributed learning (1803.01498) [M].
      norm clipping: Sun et al., Can you really backdoor federated learning? (1911.07963) [M]; the median in
      place of a constant, each part of an upload by itself, and the stacked lane are ours [I].
    """
    return {
        "mean": MEAN,
        "median": Aggregator(partial(trimmed, trim=0.5)),
        "trimmed_mean": Aggregator(partial(trimmed, trim=TRIM if trim is None else trim)),
        "norm_clip": Aggregator(norm_clipped),
    }[name]


def trimmed(rows: Upload, weights: Array, present: Array, *, trim: float) -> Upload:
    """Means of each entry without its largest and smallest values; with a trim of 1/2, medians.

    Of `count` clients, `ceil(trim * count)` are dropped at each end, and one or two are always left. A
    stacked entry that would be dropped is moved to the nearest that would not.
    """
    del weights
    clients = len(present)
    drop = jnp.array([min(math.ceil(trim * n - 1e-9), max(n - 1, 0) // 2) for n in range(clients + 1)])
    count = present.sum()
    first = drop[count]
    last = jnp.maximum(count - 1 - first, 0)

    def ordered(x):
        x = tree.wide(x)
        return jnp.sort(jnp.where(tree.for_rows(present, x), x, jnp.inf), axis=0)  # the absent come last

    def mean(x):
        place = jnp.arange(clients)
        kept = (place >= first) & (place <= last) & (count > 0)
        # Each is divided first: two of 3e38 have a mean, and no sum.
        share = tree.keep_rows(kept, ordered(x)) / jnp.maximum(last - first + 1, 1)
        return share.sum(0)

    def moved(x):
        inside = ordered(x)
        inside = jnp.clip(x, inside[first][None], inside[last][None])
        return tree.keep_rows(present, inside.astype(x.dtype))

    summed = jax.tree.map(lambda x: count * mean(x), rows.sum)
    return Upload(jax.tree.map(mean, rows.mean), summed, jax.tree.map(moved, rows.stack))


def norm_clipped(rows: Upload, weights: Array, present: Array) -> Upload:
    """Sums of uploads whose parts are scaled down to the median of their norms.

    A part is what a lane has under one of its names: all changes together, all first moments together, the
    stacked second moment of one kernel.
    """

    def lane(parts):
        parts = parts if isinstance(parts, dict) else {"": parts} if jax.tree.leaves(parts) else {}
        return {name: part_clipped(part) for name, part in parts.items()} or ()

    def part_clipped(part):
        if not jax.tree.leaves(part):
            return part
        norm = norms(part)
        bound = jnp.nanmedian(jnp.where(present, norm, jnp.nan))
        return clipped(part, jnp.where(present.any(), bound, 0))

    mean, summed, stack = (lane(parts) for parts in rows)
    return Upload(*_added(mean, summed, weights, present), stack)


def norms(rows: Tree) -> Array:
    """The global norm of each row `[C]`, in float32 or wider; squares of 1e30 would not be finite."""
    wide = [tree.wide(x.reshape(len(x), -1)) for x in jax.tree.leaves(rows)]
    peak = jnp.stack([abs(x).max(1) for x in wide]).max(0)
    unit = jnp.where(peak > 0, peak, 1)
    return peak * jnp.sqrt(sum(jnp.square(x / unit[:, None]).sum(1) for x in wide))


def clipped(rows: Tree, bound: float | Array) -> Tree:
    """Scales down each row `[C, ...]` whose global norm is above the bound."""
    norm = norms(rows)
    scale = jnp.where(norm > bound, bound / jnp.where(norm > 0, norm, 1), 1)

    return jax.tree.map(lambda x: x * tree.for_rows(scale.astype(x.dtype), x), rows)


def with_noise(total: Tree, key: Array, scale: Array) -> Tree:
    """Adds independent Gaussian noise of that standard deviation to every entry."""
    leaves, structure = jax.tree.flatten(total)
    noisy = [
        x + scale.astype(x.dtype) * jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)
        for i, x in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, noisy)


def _added(mean: Tree, summed: Tree, weights: Array, present: Array) -> tuple[Tree, Tree]:
    """The two lanes that are sums, with and without weights."""
    return tree.weighted_sum(mean, weights), tree.weighted_sum(summed, present.astype(jnp.float32))


def _changes_only(rows: Upload) -> dict:
    """The changes of an upload that has nothing else, which a bound on their norm covers."""
    if "shrink" in rows.mean.get("change", {}):
        raise ValueError(
            "weight_decay with dp_clip: factored clients send how much their kernels decayed, which noise"
            " would move, and all kernels with it: give --weight_decay=0, or --client_weights=dense"
        )
    others = [*(rows.mean.keys() - {"change"}), *(("a sum",) if jax.tree.leaves(rows.sum) else ())]
    others += ["stacked rows"] if jax.tree.leaves(rows.stack) else []
    pairs = jax.tree.leaves(rows.mean, is_leaf=lambda leaf: isinstance(leaf, LowRank))
    others += ["factors of changes"] if any(isinstance(leaf, LowRank) for leaf in pairs) else []
    if others:
        raise ValueError(
            f"dp_clip bounds what a method averages of its weights' changes, and this one sends"
            f" {', '.join(sorted(others))} besides: give another --method (of fedgalore, --opt sync=none)"
        )
    return rows.mean
