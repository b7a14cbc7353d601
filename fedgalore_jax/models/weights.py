"""Weights from and to Hugging Face directories: one table per family, one generic loader.

A family is a module with `Config`, `build`, `table`, `files`, `PREFIX`, `HEAD` and `IGNORED` (see
`vit.py`), and, where `config.json` has other names than `Config` or a tensor may be there twice, `fields` and
`COPIES` (see `llama.py`); adding one means writing that module and naming it in `configs.FAMILIES`.
"""

import functools
import json
import logging
import math
import os
import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from fedgalore_jax import placement, tree
from fedgalore_jax.models import configs, tensors
from fedgalore_jax.models.functional import ModelFns, Transform
from fedgalore_jax.models.tensors import Tensor
from fedgalore_jax.types import Array, Flat, Params

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
    precision: str = "float32",
    scan_layers: bool | None = None,
    remat: bool = False,
    dropout: float | None = None,
    shardings: Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None] | None = None,
    key: Array | None = None,
) -> tuple[ModelFns, Params]:
    """Loads a model from a Hugging Face directory.

    Tensors go one by one from the mapped file to their place, so the process's peak memory rises by
    little more than the parameters take.

    Args:
      path: a directory with `config.json` and `model.safetensors`, or the shards of an index.
      num_labels: the number of classes. Where the checkpoint's head has another size, or there is
        none, a new head is drawn (normal with `initializer_range`, zero bias) and that is logged; so is
        a pooler that the checkpoint lacks.
      new_head: draw a new head even where the checkpoint's would fit.
      dtype: of all parameters; None keeps what the file has.
      precision: what products run in, "float32" or "bf16"; see `ModelFns`.
      scan_layers: see `functional.unroll`.
      remat: compute each layer again in the backward pass, which saves memory.
      dropout: replaces the dropout probabilities of the configuration.
      shardings: `(path, shape) -> Sharding` of a parameter; None, or where it gives None, leaves it
        on the default device.
      key: for a new head; None is `jax.random.key(0)`.

    Returns:
      `(fns, params)`: the model's functions, and its parameters with layers stacked.

    Raises:
      ValueError: one message that names the file, everything that is wrong with it, and the remedy.
    """
    path = pathlib.Path(path)
    family, config = configs.read(path, num_labels, dropout)
    fns = family.build(config, precision=precision, scan_layers=scan_layers, remat=remat)
    slots, (file, found) = slots_of(fns), tensors.find(path)
    for copy, origin in getattr(family, "COPIES", {}).items():
        if copy not in slots and {copy, origin} <= found.keys() and not found[copy].equals(found[origin]):
            raise ValueError(
                f"{file}: {copy} is not {origin}, which {configs.CONFIG} ties it to: set tie_word_embeddings"
                " to false there"
            )
    found = _named_as_now(family, slots, found)

    head = {name: slot for name, slot in slots.items() if re.match(family.HEAD, slot.path)}
    unfit = num_labels is not None and any(
        name not in found or found[name].shape != slot.shape for name, slot in head.items()
    )
    if unfit:
        log.warning("%s has no head for %d labels: a new one is drawn", path, num_labels)
    if fresh := new_head or unfit:
        # A masked language model, which BERT was pre-trained as, has none; the head is trained with it.
        pooler = {name: slot for name, slot in slots.items() if slot.path.startswith("pooler/")}
        if pooler and not pooler.keys() & found.keys():
            log.warning("%s has no pooler: a new one is drawn", path)
            head |= pooler
        slots = {name: slot for name, slot in slots.items() if name not in head}
        found = {name: x for name, x in found.items() if not re.match(family.HEAD, name.replace(".", "/"))}
    if wrong := _mismatches(slots, found):
        raise ValueError(
            f"{file} does not fit {configs.CONFIG}: {'; '.join(wrong)}: use the "
            f"{configs.CONFIG} saved with it, and num_labels where only the head differs or is missing"
        )

    def place(leaf: str, x: Any) -> Array:
        return placement.put(x, shardings and shardings(leaf, x.shape))

    shapes, rows = _shapes(fns), {}
    for name, slot in slots.items():
        rows.setdefault(slot.path, []).append((slot, found[name]))
    flat = {}
    # The largest first: what holds it for a moment is then not on top of all the others.
    for leaf in sorted(rows, key=lambda leaf: -math.prod(shapes[leaf].shape)):
        flat[leaf] = place(leaf, _read(rows[leaf], shapes[leaf].shape, dtype))
    if fresh:
        lost = {slot.path for slot in head.values()}
        # Under jit, what init draws for the rest of the model is never computed.
        draw = jax.jit(lambda key: {p: tree.flatten(fns.init(key))[p] for p in lost})
        drawn = draw(jax.random.key(0) if key is None else key)
        flat |= {leaf: place(leaf, jnp.asarray(x, dtype)) for leaf, x in drawn.items()}
    return fns, tree.unflatten(dict(sorted(flat.items())))


def save(path: str | os.PathLike, fns: ModelFns, params: Params) -> None:
    """Writes a directory that `load` and torch `transformers` read.

    Of a model that is of no family here it holds `model.safetensors` alone, whose names are the paths of the
    parameters: `tree.unflatten(safetensors.numpy.load_file(file))` gives them back.

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
    flat, known = tree.flatten(params), configs.family_of(fns.config) is not None
    got = {leaf: getattr(array, "shape", None) for leaf, array in flat.items()}
    want = {leaf: array.shape for leaf, array in _shapes(fns).items()} if known else got
    if wrong := sorted(p for p in want.keys() | got.keys() if got.get(p) is None or want.get(p) != got[p]):
        raise ValueError(
            f"cannot save to {path}: {', '.join(wrong)} missing, unknown, of another shape or not "
            "merged: pass all of the model's parameters as plain arrays"
        )
    rows, files = {leaf: np.asarray(array) for leaf, array in flat.items()}, {}
    if known:
        rows, files = _named_as_there(fns, rows), configs.to_json(fns.config)
    rows = {name: np.ascontiguousarray(array) for name, array in rows.items()}

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
        new = pathlib.Path(temporary) / path.name
        new.mkdir()
        (new / tensors.WEIGHTS).touch()
        mode = (new / tensors.WEIGHTS).stat().st_mode
        for name, content in files.items():
            (new / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        safetensors.numpy.save_file(rows, new / tensors.WEIGHTS, {"format": "pt"})
        # safetensors lets nobody but the owner read; the folder is for whom its other files are for.
        (new / tensors.WEIGHTS).chmod(mode)
        if not path.exists():
            new.rename(path)
            return
        for file in new.iterdir():
            file.replace(path / file.name)


def _named_as_there(fns: ModelFns, flat: Flat) -> dict[str, np.ndarray]:
    """The parameters as the tensors of the family's file, by their names."""
    rows = {}
    for name, slot in slots_of(fns).items():
        array = flat[slot.path] if slot.layer is None else flat[slot.path][slot.layer]
        rows[name] = slot.transform(array)
    return rows


def _shapes(fns: ModelFns) -> Flat:
    return tree.flatten(jax.eval_shape(fns.init, jax.random.key(0)))


def slots_of(fns: ModelFns) -> dict[str, Slot]:
    """What the file of this model must hold, by the names of its tensors."""
    family, slots = configs.family_of(fns.config), {}
    for path, leaf in _shapes(fns).items():
        rows = ((re.fullmatch(ours, path), *row) for ours, *row in family.table(fns.config))
        match, theirs, transform = next((match, *row) for match, *row in rows if match)
        stacked = "{layer}" in theirs
        one = jax.ShapeDtypeStruct(leaf.shape[stacked:], leaf.dtype)
        shape = jax.eval_shape(transform, one).shape
        for layer in range(leaf.shape[0]) if stacked else (None,):
            name = match.expand(theirs).format(layer=layer)
            slots[name] = Slot(path, layer, shape, transform)
    return slots


def _named_as_now(family: Any, slots: dict[str, Slot], found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names of the family's whole model, without what it does not need."""
    found = {re.sub(r"LayerNorm\.(gamma|beta)$", _renamed, name): x for name, x in found.items()}
    if not any(name.startswith(family.PREFIX) for name in found):  # a bare encoder, no head
        found = {family.PREFIX + name: x for name, x in found.items()}
    return {name: x for name, x in found.items() if name in slots or not re.match(family.IGNORED, name)}


def _renamed(match: re.Match) -> str:
    """Checkpoints from before PyTorch call scale and bias of a norm gamma and beta."""
    return f"LayerNorm.{'weight' if match[1] == 'gamma' else 'bias'}"


def _read(rows: list[tuple[Slot, Tensor]], shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """One leaf of ours, its layers stacked, read straight into its memory."""
    own = {tensors.DTYPES[tensor.dtype] for _, tensor in rows}
    wanted = functools.reduce(jnp.promote_types, own) if dtype is None else dtype
    out = tensors.empty(shape, jax.dtypes.canonicalize_dtype(wanted))
    for slot, tensor in rows:
        row = out if slot.layer is None else out[slot.layer]
        view = slot.transform(row)
        assert np.shares_memory(view, row), f"the table's transform of {slot.path} is not a view"
        tensor.read_into(view)
    return out


def _mismatches(slots: dict[str, Slot], found: dict[str, Tensor]) -> list[str]:
    """Everything in which the tensors differ from what the model needs, in words."""
    both = sorted(slots.keys() & found.keys())
    kinds = {
        "missing": sorted(slots.keys() - found.keys()),
        "unexpected": sorted(found.keys() - slots.keys()),
        "wrong shape": [
            f"{name} {found[name].shape} instead of {slots[name].shape}"
            for name in both
            if found[name].shape != slots[name].shape
        ],
        f"not of a type among {', '.join(tensors.DTYPES)}": [
            f"{name} ({found[name].dtype})" for name in both if found[name].dtype not in tensors.DTYPES
        ],
    }
    return [f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names]
