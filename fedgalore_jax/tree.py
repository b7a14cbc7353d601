"""Small things done to pytrees: paths, ordered regex rules, bytes, weighted sums."""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from fedgalore_jax.types import Array, Flat, LowRank, Params, Tree


def flatten(params: Params) -> Flat:
    """Nested dicts to `{"a/b/c": leaf}`, in sorted order of the paths.

    >>> flatten({"head": {"bias": 1, "kernel": 2}, "scale": 3})
    {'head/bias': 1, 'head/kernel': 2, 'scale': 3}
    """

    def walk(node, path):
        if not isinstance(node, Mapping):
            yield path, node
            return
        for name in node:
            yield from walk(node[name], f"{path}/{name}" if path else name)

    return dict(sorted(walk(params, "")))


def unflatten(flat: Flat) -> Params:
    """The inverse of `flatten`.

    >>> unflatten({'head/bias': 1, 'head/kernel': 2, 'scale': 3})
    {'head': {'bias': 1, 'kernel': 2}, 'scale': 3}
    """
    nested: Params = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return nested


def resolve(paths: Iterable[str], rules: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Gives each path the value of the first rule whose regex matches it from its start.

    Args:
      paths: what to decide about.
      rules: ordered `(regex, value)` pairs, as in big_vision: the first match decides.

    Raises:
      ValueError: a path that no rule matches, or a rule that matches no path (a typo, almost always).

    >>> resolve(["head/kernel", "layers/kernel"], [("head", "train"), (".*", "freeze")])
    {'head/kernel': 'train', 'layers/kernel': 'freeze'}
    """
    decided: dict[str, str] = {}
    paths = list(paths)
    for path in paths:
        for pattern, value in rules:
            if re.match(pattern, path):
                decided[path] = value
                break
    if missed := [path for path in paths if path not in decided]:
        raise ValueError(f"no rule matches {', '.join(missed)}: end the rules with ('.*', ...)")
    for pattern, _ in rules:
        if not any(re.match(pattern, path) for path in paths):
            raise ValueError(f"pattern {pattern!r} matches no parameter of {', '.join(paths)}")
    return decided


def braced(paths: Iterable[str]) -> str:
    """Paths for people: those that differ in the module's name alone are written as one.

    >>> braced(["head/bias", "layers/key/kernel", "layers/value/kernel"])
    'head/bias, layers/{key,value}/kernel'
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for path in paths:
        *parents, module, leaf = ["", *path.split("/")] if "/" in path else ["", "", path]
        groups.setdefault(("/".join(parents[1:]), leaf), []).append(module)
    return ", ".join(
        "/".join(filter(None, (parents, f"{{{','.join(m)}}}" if len(m) > 1 else m[0], leaf)))
        for (parents, leaf), m in groups.items()
    )


def by_shape(flat: Flat) -> list[list[str]]:
    """Groups paths whose leaves have one shape and dtype, so that they can be stacked and go through a
    decomposition together: a program then compiles it once per shape, not once per leaf.

    >>> by_shape({"a": jnp.ones(2), "b": jnp.ones(3), "c": jnp.zeros(2)})
    [['a', 'c'], ['b']]
    """
    groups: dict[tuple, list[str]] = {}
    for path, leaf in flat.items():
        groups.setdefault((leaf.shape, leaf.dtype), []).append(path)
    return list(groups.values())


def nbytes(tree: Tree) -> int:
    """Bytes of all leaves; arrays and `ShapeDtypeStruct`s alike, typed PRNG keys by their data."""

    def one(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        return leaf.size * leaf.dtype.itemsize

    return sum(map(one, jax.tree.leaves(tree)))


def digest(tree: Tree) -> str:
    """A hash of a tree's arrays: their paths, types, shapes and, summed up where they lie, all their bits."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        found.update(
            f"{jax.tree_util.keystr(path)} {leaf.dtype}{leaf.shape} {int(_sum_of_bits(leaf))}".encode()
        )
    return found.hexdigest()[:16]


@jax.jit
def _sum_of_bits(x: Array) -> Array:
    """Bits of real numbers as integers, each times an odd number that its place gives it: exact in any order,
    so the same on any devices."""
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * min(4, x.dtype.itemsize)}").astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return (bits * (2 * place + 1)).sum(dtype=jnp.uint32)


def apart(tree: Tree) -> Tree:
    """The tree as it is now: its NumPy arrays, which may be written in place, are copied."""
    return jax.tree.map(lambda x: x.copy() if isinstance(x, np.ndarray) else x, tree)


def without(marks: Tree, whole: Tree) -> Tree:
    """A tree with None for every leaf that has a mark, anything but None, in a tree of the same form.

    >>> without({"a": None, "b": 7}, {"a": 1, "b": 2})
    {'a': 1, 'b': None}
    """
    return jax.tree.map(lambda mark, x: x if mark is None else None, marks, whole, is_leaf=_is_none)


def joined(part: Tree, whole: Tree) -> Tree:
    """A tree with the leaves of `part`, and where that has None those of `whole`.

    >>> joined({"a": 3, "b": None}, {"a": 1, "b": 2})
    {'a': 3, 'b': 2}
    """
    return jax.tree.map(lambda x, other: other if x is None else x, part, whole, is_leaf=_is_none)


def _is_none(leaf: Tree) -> bool:
    return leaf is None


def wide(arrays: Tree) -> Tree:
    """Arrays in float32, or as they are where they are wider or hold no real numbers (indices, keys)."""

    def one(x):
        real = jnp.issubdtype(x.dtype, jnp.inexact)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if real else x

    return jax.tree.map(one, arrays)


def for_rows(vector: Array, rows: Array) -> Array:
    """A number for each row, `[C]`, in a shape that goes with rows `[C, ...]`."""
    return vector.reshape(-1, *(1 for _ in rows.shape[1:]))


def all_finite(tree: Tree) -> Array:
    """Whether no leaf has a NaN or an infinity, a boolean scalar."""
    numbers = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.array([jnp.isfinite(x).all() for x in numbers]).all()


def keep_rows(keep: Array, rows: Tree) -> Tree:
    """Zeroes the rows `[C, ...]` of clients that are not kept, `[C]`: a product would leave their NaNs."""

    def one(x):
        return jnp.where(for_rows(keep, x), x, jnp.zeros((), x.dtype))

    return jax.tree.map(one, rows)


def weighted_sum(rows: Tree, weights: Array) -> Tree:
    """Sums rows of clients with weights, in float32 or better; factored matrices become dense.

    Args:
      rows: a pytree with a leading client axis `[C, ...]`. A `LowRank` leaf, `a [C, ..., m, r]` and
        `b [C, ..., r, n]`, is contracted over clients and rank at once, so that C dense copies never exist.
      weights: `[C]`.

    Returns:
      The pytree without the client axis; a `LowRank` has become a dense `[..., m, n]`.
    """

    def one(leaf):
        if isinstance(leaf, LowRank):
            product = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
            return product("c,c...mr,c...rn->...mn", weights, leaf.a, leaf.b)
        leaf = wide(leaf)
        return jnp.tensordot(weights.astype(leaf.dtype), leaf, 1, precision=jax.lax.Precision.HIGHEST)

    return jax.tree.map(one, rows, is_leaf=lambda leaf: isinstance(leaf, LowRank))
