"""Weights from and to Hugging Face directories: one table per family, one generic loader.

A family is a module with `Config`, `build`, `table`, `files`, `ignored`, `PREFIX` and `HEAD` (see
`vit.py`); adding one means writing that module and naming it in `configs.FAMILIES`.
"""

import collections
import json
import logging
import os
import pathlib
import re
import tempfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from fedgalore_jax import tree
from fedgalore_jax.models import configs
from fedgalore_jax.models.functional import ModelFns, Transform
from fedgalore_jax.types import Array, Flat, Params

WEIGHTS = "model.safetensors"
log = logging.getLogger(__name__)


class Slot(NamedTuple):
    """Where a tensor of the file belongs: a leaf of ours, and its row where layers are stacked."""

    path: str
    layer: int | None
    shape: tuple[int, ...]  # in the file
    transform: Transform


def load(
    path: str | os.PathLike,
    *,
    num_labels: int | None = None,
    new_head: bool = False,
    dtype: Any = None,
    dropout: float | None = None,
    key: Array | None = None,
) -> tuple[ModelFns, Params]:
    """Loads a model from a Hugging Face directory.

    Args:
      path: a directory with `config.json` and `model.safetensors`.
      num_labels: the number of classes. Where the checkpoint's head has another size, or there is
        none, a new head is drawn (normal with `initializer_range`, zero bias) and that is logged.
      new_head: draw a new head even where the checkpoint's would fit.
      dtype: of all parameters, and so of the products; None keeps what the file has.
      dropout: replaces both dropout probabilities of the configuration.
      key: for a new head; None is `jax.random.key(0)`.

    Returns:
      `(fns, params)`: the model's functions, and its parameters with layers stacked.

    Raises:
      ValueError: one message that names the file, everything that is wrong with it, and the remedy.
    """
    path = pathlib.Path(path)
    family, config = configs.read(path, num_labels, dropout)
    fns = family.build(config)
    slots, tensors = _slots(family, fns), _read_tensors(path / WEIGHTS)
    if not any(name.startswith(family.PREFIX) for name in tensors):  # a bare encoder, no head
        tensors = {family.PREFIX + name: tensor for name, tensor in tensors.items()}
    tensors = {name: x for name, x in tensors.items() if not re.match(family.ignored(config), name)}

    head = {name: slot for name, slot in slots.items() if re.match(family.HEAD, slot.path)}
    unfit = num_labels is not None and any(
        name not in tensors or tensors[name].shape != slot.shape for name, slot in head.items()
    )
    if unfit:
        log.warning("%s has no head for %d labels: a new one is drawn", path, num_labels)
    if fresh := new_head or unfit:
        slots = {name: slot for name, slot in slots.items() if name not in head}
        tensors = {name: x for name, x in tensors.items() if name not in head}
    if wrong := _mismatches(slots, tensors):
        raise ValueError(
            f"{path / WEIGHTS} does not fit {configs.CONFIG}: {'; '.join(wrong)}: use the "
            f"{configs.CONFIG} saved with it, and num_labels where only the head differs"
        )

    rows = collections.defaultdict(list)
    for name, slot in slots.items():
        rows[slot.path].append(slot.transform.load(tensors[name]))
    stacked = {slot.path for slot in slots.values() if slot.layer is not None}
    flat = {leaf: np.stack(r) if leaf in stacked else r[0] for leaf, r in rows.items()}
    if fresh:
        lost = {slot.path for slot in head.values()}
        # Under jit, what init draws for the rest of the model is never computed.
        draw = jax.jit(lambda key: {p: tree.flatten(fns.init(key))[p] for p in lost})
        flat |= draw(jax.random.key(0) if key is None else key)
    return fns, tree.unflatten({leaf: jnp.asarray(x, dtype) for leaf, x in sorted(flat.items())})


def save(path: str | os.PathLike, fns: ModelFns, params: Params) -> None:
    """Writes a directory that `load` and torch `transformers` read.

    Everything is written to a temporary directory first and then renamed, so an interrupted call
    leaves no half-written file; other files in an existing directory stay.

    Args:
      path: the directory.
      fns: the model's functions.
      params: its parameters as plain arrays (merge adapters first).

    Raises:
      ValueError: `params` are not this model's.
    """
    path = pathlib.Path(path)
    family = next(f for f in configs.FAMILIES.values() if isinstance(fns.config, f.Config))
    shapes, flat = _shapes(fns), tree.flatten(params)
    got = {leaf: getattr(array, "shape", None) for leaf, array in flat.items()}
    want = {leaf: array.shape for leaf, array in shapes.items()}
    if wrong := sorted(p for p in want.keys() | got.keys() if want.get(p) != got.get(p)):
        raise ValueError(
            f"cannot save to {path}: {', '.join(wrong)} missing, unknown, of another shape or not "
            "merged: pass all of the model's parameters as plain arrays"
        )
    flat = {leaf: np.asarray(array) for leaf, array in flat.items()}
    tensors = {}
    for name, slot in _slots(family, fns).items():
        array = flat[slot.path] if slot.layer is None else flat[slot.path][slot.layer]
        tensors[name] = np.ascontiguousarray(slot.transform.save(array))

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
        new = pathlib.Path(temporary) / path.name
        new.mkdir()
        for name, content in configs.to_json(fns.config).items():
            (new / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        (new / WEIGHTS).write_bytes(safetensors.numpy.save(tensors, {"format": "pt"}))
        if not path.exists():
            new.rename(path)
            return
        for file in new.iterdir():
            file.replace(path / file.name)


def _shapes(fns: ModelFns) -> Flat:
    return tree.flatten(jax.eval_shape(fns.init, jax.random.key(0)))


def _slots(family: Any, fns: ModelFns) -> dict[str, Slot]:
    """What the file of this model must hold, by the names of its tensors."""
    slots = {}
    for path, leaf in _shapes(fns).items():
        rows = ((re.fullmatch(ours, path), *row) for ours, *row in family.table(fns.config))
        match, theirs, transform = next((match, *row) for match, *row in rows if match)
        stacked = "{layer}" in theirs
        one = jax.ShapeDtypeStruct(leaf.shape[stacked:], leaf.dtype)
        shape = jax.eval_shape(transform.save, one).shape
        for layer in range(leaf.shape[0]) if stacked else (None,):
            name = match.expand(theirs).format(layer=layer)
            slots[name] = Slot(path, layer, shape, transform)
    return slots


def _mismatches(slots: dict[str, Slot], tensors: dict[str, np.ndarray]) -> list[str]:
    """Everything in which the tensors differ from what the model needs, in words."""
    shapes = [
        f"{name} {tensors[name].shape} instead of {slots[name].shape}"
        for name in sorted(slots.keys() & tensors.keys())
        if tensors[name].shape != slots[name].shape
    ]
    kinds = {
        "missing": sorted(slots.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - slots.keys()),
        "wrong shape": shapes,
    }
    return [f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names]


def _read_tensors(file: pathlib.Path) -> dict[str, np.ndarray]:
    if not file.exists():
        raise ValueError(f"{file} does not exist: save the model as safetensors")
    try:
        return safetensors.numpy.load_file(file)
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged ({error}): copy it again") from error
