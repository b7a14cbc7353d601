"""Where arrays lie: the mesh of a run, and what is spread over it.

A mesh has two axes. The cohort is spread over `clients`, a model's weights over `model`. Its axes are `Auto`
(the compiler finds the shardings in between), and this is the only place that makes one. Without a mesh every
function here leaves things as they are.
"""

import contextlib
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fedgalore_jax import tree
from fedgalore_jax.types import Adapted, Array, Flat, Params, Tree

CLIENTS, MODEL = AXES = ("clients", "model")
WEIGHTS = (
    (r"layers/.*(query|key|value|intermediate|gate|up)/(kernel|bias)", -1),
    (r"layers/.*(output|down)/kernel", -2),
    (r"embeddings/(word_embeddings|embed_tokens)", -2),
    (r"lm_head/kernel", -1),
    (r".*", None),
)
"""Which axis of a weight is spread over `model`: the output side of products that begin a block and the input
side of the one that ends it, so that activations are summed once a block; vocabularies; nothing else."""


def mesh(shape: str | None, devices: Sequence[Any] | None = None) -> Mesh | None:
    """The mesh of a run.

    Args:
      shape: clients x model, such as "8x1"; None is no mesh, and one device, or, where there are several
        processes, all devices for clients.
      devices: that it is made of; this run's if None.

    Raises:
      ValueError: there are not so many devices.
    """
    if shape is None and jax.process_count() == 1:
        return None
    devices = jax.devices() if devices is None else devices
    shape = shape or f"{len(devices)}x1"
    sizes = tuple(map(int, shape.split("x")))
    needed, found = math.prod(sizes), len(devices)
    if needed > found:
        raise ValueError(f"mesh={shape!r} is of {needed} devices, and there are {found}: give a smaller one")
    if needed < found and jax.process_count() > 1:
        raise ValueError(f"mesh={shape!r} is of {needed} devices: give one of all {found} of these processes")
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 2, devices=devices[:needed])


def on(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """Traces with a mesh: what `over_clients` and `each_layer` refer to."""
    return contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def size(mesh: Mesh | None) -> int:
    """How many devices a run has."""
    return 1 if mesh is None else mesh.size


def shares(mesh: Mesh | None) -> int:
    """Into how many shares a cohort is cut."""
    return 1 if mesh is None else mesh.shape[CLIENTS]


def over_clients(rows: Tree, axis: int = 0) -> Tree:
    """Spreads an axis of traced arrays over `clients`, which divides it; other axes stay as they are."""
    if jax.sharding.get_abstract_mesh().empty:
        return rows

    def one(x):
        where = [PartitionSpec.UNCONSTRAINED] * x.ndim
        where[axis] = CLIENTS
        return jax.lax.with_sharding_constraint(x, PartitionSpec(*where))

    return jax.tree.map(one, rows)


def everywhere(arrays: Tree) -> Tree:
    """Has traced arrays whole on every device."""
    if jax.sharding.get_abstract_mesh().empty:
        return arrays
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec()), arrays)


def each_layer(function: Callable[..., Any], axis: int) -> Callable[[Array], Any]:
    """As `jax.vmap(function, axis)` of rows of clients; the devices of a mesh share the layers out."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.vmap(function, axis)

    def spread(rows: Array) -> Any:
        where = PartitionSpec(CLIENTS)
        # A step in between, so that each is an exchange between devices that the compiler knows.
        x = jnp.moveaxis(jax.lax.with_sharding_constraint(rows, where), axis, 0)
        layers = len(x)
        x = jnp.pad(x, [(0, -layers % mesh.shape[CLIENTS]), *[(0, 0)] * (x.ndim - 1)])
        # By hand: decompositions, which a CPU makes one after the other, would else be made by every device.
        own = jax.shard_map(jax.vmap(function), in_specs=where, out_specs=where, check_vma=False)
        return everywhere(jax.tree.map(lambda y: y[:layers], own(x)))

    return spread


def weight(mesh: Mesh | None, path: str, shape: tuple[int, ...]) -> NamedSharding | None:
    """Where a parameter lies, by `WEIGHTS`; whole on every device where its axis does not divide."""
    return mesh and NamedSharding(mesh, _spec(mesh, path, shape))


def _spec(mesh: Any, path: str, shape: tuple[int, ...]) -> PartitionSpec:
    axis = next(axis for pattern, axis in WEIGHTS if re.match(pattern, path))
    if axis is None or mesh.shape[MODEL] == 1 or shape[axis] % mesh.shape[MODEL]:
        return PartitionSpec()
    return PartitionSpec(*[None] * (len(shape) + axis), MODEL)


def _each(spec: PartitionSpec, axes: int) -> list:
    """What each axis is spread over."""
    return [*spec, *[None] * (axes - len(spec))]


def as_weights(params: Params) -> Params:
    """Has traced parameters lie where weights do, and the factors of adapters as the sides of their kernels.

    Unpinned, factors of kernels of one shape lie alike, since the server stacks them: those of a product that
    ends a block as of those that begin it. Activations between blocks lie in parts then, and are gathered.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.shape.get(MODEL, 1) == 1:
        return params

    def pinned(x, *axes):
        return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))

    def one(path, x):
        if not isinstance(x, Adapted):
            return pinned(x, *_spec(mesh, path, x.shape))
        *stack, m, n = _each(_spec(mesh, path, x.base.shape), x.base.ndim)
        return x._replace(
            base=pinned(x.base, *stack, m, n), a=pinned(x.a, *stack, m), b=pinned(x.b, *stack, None, n)
        )

    return tree.unflatten({path: one(path, x) for path, x in tree.flatten(params).items()})


def weights(mesh: Mesh | None, params: Params) -> Params:
    """A model's parameters where they lie."""
    flat = tree.flatten(params)
    return (
        tree.unflatten({path: put(x, weight(mesh, path, x.shape)) for path, x in flat.items()})
        if mesh
        else params
    )


def whole(mesh: Mesh) -> NamedSharding:
    """On every device."""
    return NamedSharding(mesh, PartitionSpec())


def of_server(mesh: Mesh, state: Tree, weights: Flat) -> Tree:
    """Shardings of a server's state: what is kept under a weight's path in its shape lies as it does.

    Args:
      mesh: of the run.
      state: arrays or their shapes.
      weights: `{path: leaf}` of the model.
    """
    return jax.tree.map_with_path(lambda keys, x: _as_weight(mesh, keys, x.shape, weights), state)


def of_clients(mesh: Mesh, rows: Tree, weights: Flat) -> Tree:
    """Shardings of clients' memories `[N, ...]`: every row in parts on all devices.

    Each device reads and writes its part of any row, and exchanges parts with those that train the clients.
    Whole rows on single devices, all of which are gathered by all to get at some, are for rows of which no
    axis divides, if N does. What is kept in a weight's shape is spread over `model` as that is.
    """

    def one(keys, x):
        spec = _each(_as_weight(mesh, keys, x.shape[1:], weights).spec, x.ndim - 1)
        divides = [n % mesh.shape[CLIENTS] == 0 for n in x.shape]
        free = [i for i in range(1, x.ndim) if divides[i] and not spec[i - 1]]
        if free:  # the longest; the last only where it is alone: devices compute on it in wide rows
            spec[max(free, key=lambda i: (i < x.ndim - 1, x.shape[i])) - 1] = CLIENTS
        return NamedSharding(mesh, PartitionSpec(CLIENTS if divides[0] and not free else None, *spec))

    return jax.tree.map_with_path(one, rows)


def _as_weight(mesh: Mesh, keys: tuple, shape: tuple[int, ...], weights: Flat) -> NamedSharding:
    path = getattr(keys[-1], "key", "") if keys else ""
    is_one = path in weights and weights[path].shape == shape
    return (is_one and weight(mesh, path, shape)) or whole(mesh)


def along(mesh: Mesh | None, axis: int) -> NamedSharding | None:
    """Sharding of rows of clients or samples, which that axis counts; None without a mesh."""
    return mesh and NamedSharding(mesh, PartitionSpec(*[None] * axis, CLIENTS))


def placed(shapes: Tree, shardings: Tree) -> Tree:
    """Shapes with the shardings of their arrays."""

    def one(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(one, shapes, shardings)


def put(x: Any, sharding: jax.sharding.Sharding | None) -> Array:
    """A host's array on its devices; every process gives the same, and keeps its share."""
    if sharding is None:
        return jax.device_put(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda where: np.asarray(x[where]))


def rows(x: Any, ids: np.ndarray, sharding: NamedSharding | None) -> Array:
    """Rows `x[ids]` of a host's array on its devices.

    Every process gives the same. It gathers and transfers the rows of its own devices alone, once for all
    devices that have the same: JAX asks for the shares of a process's devices only, wherever a mesh has them.

    Args:
      x: NumPy's, or read by the row as those are, `[n, ...]`.
      ids: rows of it, of any shape.
      sharding: of `[*ids.shape, ...]`; None without a mesh.
    """
    if sharding is None:
        return jax.device_put(x[ids])
    gathered: dict[str, np.ndarray] = {}

    def share(where: Any) -> np.ndarray:
        if str(where) not in gathered:
            wanted, part = ids[where[: ids.ndim]], where[ids.ndim :]
            whole = all(axis == slice(None) for axis in part)  # what is read by the row takes nothing else
            gathered[str(where)] = x[wanted] if whole else x[(wanted, *part)]
        return gathered[str(where)]

    return jax.make_array_from_callback((*ids.shape, *x.shape[1:]), sharding, share)
