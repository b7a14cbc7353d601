"""The subspaces that gradient-subspace methods train in: one basis `P` for every adapted kernel.

In the in x out layout a basis lies on the "left" (input side, `P [m, r]`, `Z [r, n]`) or on the "right"
(output side, `P [n, r]`, `Z [m, r]`); everything here hides which.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedgalore_jax import tree
from fedgalore_jax.galore import in_subspace
from fedgalore_jax.lowrank import leading_subspace, orthonormalise, random_basis
from fedgalore_jax.strategies.base import Common
from fedgalore_jax.types import Array, Flat, LowRank

_matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
SIDES = ("left", "right")
TRANSPORTS = ("keep", "row_mean", "squared_overlap")


class Subspaces(NamedTuple):
    """Where the bases lie and how large they are.

    Attributes:
      rank: r.
      side: one of `SIDES`.
    """

    rank: int
    side: str = "left"

    def left(self, x: Array) -> Array:
        """Puts the subspace axis first and the shared axis last, and back."""
        return x if self.side == "left" else jnp.swapaxes(x, -1, -2)

    def factors(self, p: Array, z: Array) -> LowRank:
        """`P Z`, or `Z Pᵀ`, as factors of an in x out matrix."""
        return LowRank(p, z) if self.side == "left" else LowRank(z, jnp.swapaxes(p, -1, -2))

    def zeros(self, kernels: Flat) -> Flat:
        """Z = 0 for every kernel `[..., m, n]`."""
        shapes = {path: (*w.shape[:-2], self.rank, self.left(w).shape[-1]) for path, w in kernels.items()}
        return {path: self.left(jnp.zeros(shape, kernels[path].dtype)) for path, shape in shapes.items()}

    def check(self, kernels: Flat) -> None:
        """Raises a ValueError for a kernel whose side is no larger than the rank."""
        for path, w in kernels.items():
            if self.rank >= (size := self.left(w).shape[-2]):
                raise ValueError(
                    f"rank={self.rank} is no subspace of the {self.side} side of {path} {w.shape}: "
                    f"give less than {size}"
                )

    def random(self, kernels: Flat, key: Array, rank: int | None = None) -> Flat:
        """Uniformly distributed bases, a function of key and shapes alone: a seed is all that travels.

        Kernels of one shape share a draw, so that a program compiles it once per shape.
        """
        columns, bases = {path: self.left(w)[..., 0] for path, w in kernels.items()}, {}
        for i, paths in enumerate(tree.by_shape(columns)):
            like = columns[paths[0]]
            shape = (len(paths), *like.shape)
            drawn = random_basis(jax.random.fold_in(key, i), shape, rank or self.rank, like.dtype)
            bases |= dict(zip(paths, drawn, strict=True))
        return bases

    def leading(self, matrices: Flat, key: Array, finder: str, rank: int | None = None) -> Flat:
        """Bases of the leading singular subspaces of `matrices`, see `lowrank.leading_subspace`.

        For a round or a few, two passes do (experiments/bench/NOTES.md has what a third would add).
        """
        bases = {}
        for i, paths in enumerate(tree.by_shape(matrices)):
            stack, own = jnp.stack([self.left(matrices[path]) for path in paths]), jax.random.fold_in(key, i)
            found = leading_subspace(stack, rank or self.rank, finder=finder, key=own, passes=2)
            bases |= dict(zip(paths, found, strict=True))
        return bases

    def explored(self, matrices: Flat, key: Array) -> Flat:
        """Bases half of leading directions, half random: what is trained in them can leave their span."""
        kept = self.leading(matrices, key, "subspace", self.rank - self.rank // 2)
        fresh = self.random(matrices, jax.random.fold_in(key, len(matrices)), self.rank // 2)
        return {path: orthonormalise(jnp.concatenate([p, fresh[path]], -1), key) for path, p in kept.items()}

    def projected(self, gradient: Array, basis: Array) -> Array:
        """The gradient of Z at Z = 0, from that of the kernel: `Pᵀ G`, or `G P`."""
        return self.left(_matmul(jnp.swapaxes(basis, -1, -2), self.left(gradient)))

    def rotated(self, moment: Array, old: Array, new: Array) -> Array:
        """A first moment carried from one basis to another: `P_newᵀ P_old M`, exact where they overlap.

        Of unrelated bases √(r / m) of its norm is left, and steps are smaller until it has grown again.
        """
        overlap = _matmul(jnp.swapaxes(new, -1, -2), old)
        return self.left(_matmul(overlap, self.left(moment)))


def in_given_bases(
    inner: optax.GradientTransformation, common: Common, space: Subspaces
) -> optax.GradientTransformationExtraArgs:
    """Clients that train kernels in full, along bases: `inner` sees their gradients' coordinates.

    Args:
      inner: any transform.
      common: says which leaves are kernels to adapt; of the others `inner` sees the gradients.
      space: of the bases, which each step is given as `extra`, `{path: P}`.
    """

    def mask(trainable):
        return {path: common.role(path) == "adapt" for path in trainable}

    inside = in_subspace(inner, space.rank, side=space.side, mask=mask)

    def update(updates, state, params: Any = None, **given):
        bases = {path: given["extra"].get(path, optax.MaskedNode()) for path in updates}
        return inside.update(updates, state, params, basis=bases)

    return optax.GradientTransformationExtraArgs(inside.init, update)


def transported(moment: Array, old: Any, new: Any, how: str) -> Array:
    """A second moment `[..., r, n]` carried from one orthonormal basis `[..., m, r]` to another.

    LDAdam applies squared overlaps, to the centred second moment [V]. Those of unrelated bases keep about r/m
    of the mass, and Adam's steps would blow up: hence the normalisation by row, of the moment itself [I].

    Args:
      moment: non-negative, rows belong to the columns of `old`.
      old, new: the bases; only "squared_overlap" reads them.
      how: one of `TRANSPORTS`.

    Returns:
      `[..., r, n]`.
    """
    if how == "keep":
        return moment
    if how == "row_mean":
        return jnp.broadcast_to(moment.mean(-2, keepdims=True), moment.shape)
    overlap = jnp.square(_matmul(jnp.swapaxes(new, -1, -2), old))
    return _matmul(overlap / jnp.maximum(overlap.sum(-1, keepdims=True), 1e-12), moment)
