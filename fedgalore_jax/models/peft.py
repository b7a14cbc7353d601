"""A low-rank result as an adapter that torch `peft` loads."""

import json
import os
import pathlib
import re
from typing import Any

import numpy as np
import safetensors.numpy

from fedgalore_jax.models import configs
from fedgalore_jax.models.functional import ModelFns
from fedgalore_jax.models.weights import slots_of
from fedgalore_jax.types import Flat, LoRA

PREFIX = "base_model.model."


def save_adapter(
    path: str | os.PathLike,
    fns: ModelFns,
    factors: dict[str, LoRA],
    *,
    base_model: str,
    lora_alpha: float,
    rank: int,
    head: Flat | None = None,
) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`.

    Args:
      path: the directory; it is made where it is missing.
      fns: the model's functions.
      factors: `{path of a kernel in a layer: LoRA(a [depth, m, r], b [depth, r, n])}`; the adapted kernel
        is `kernel + lora_alpha / rank * a @ b`, so the scale is not multiplied in.
      base_model: name or directory of the model that the adapter belongs to.
      lora_alpha: numerator of the scale.
      rank: r.
      head: `{path: array}` of a trained head, all of it; None leaves the base model's.

    Raises:
      ValueError: a path that names no kernel of a layer or no part of the head, or a wrong shape.

    References:
      The layout is peft's LoRA checkpoint [V2].
    """
    family, slots, head = configs.family_of(fns.config), slots_of(fns), head or {}
    kernels, heads = adapter_paths(fns)
    if strange := sorted(factors.keys() - kernels):
        raise ValueError(f"factors of {', '.join(strange)}: an adapter has kernels of layers only")
    if head and head.keys() != heads:
        raise ValueError(f"head={sorted(head)} is not the whole head: give {', '.join(sorted(heads))}")

    tensors, targets, whole = {}, [], set()
    for name, slot in slots.items():
        module, kind = _module(family, name).rsplit(".", 1)
        if slot.path in head:
            row = np.asarray(head[slot.path])
            tensors[f"{PREFIX}{module}.{kind}"] = np.ascontiguousarray(slot.transform(row))
            whole.add(module.split(".")[0])
        elif slot.path in factors:
            a, b = (np.asarray(factor[slot.layer]) for factor in factors[slot.path])
            n, m = slot.shape
            if (a.shape, b.shape) != ((m, rank), (rank, n)):
                raise ValueError(
                    f"factors of {slot.path}: {a.shape} and {b.shape} a layer instead of "
                    f"{(m, rank)} and {(rank, n)}"
                )
            tensors[f"{PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(a.T)
            tensors[f"{PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(b.T)
            targets.append(module)
    # peft has no type for images, and looks for a classifier in the adapters of its type for texts.
    classifies = "SEQ_CLS" if head and hasattr(fns.config, "vocab_size") else None
    content = {
        "peft_type": "LORA",
        "task_type": classifies if fns.decoder is None else "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(targets),  # in full: `output.dense` alone would name two modules of BERT
        "modules_to_save": sorted(whole) or None,
    }
    path = pathlib.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(content, indent=2) + "\n")
    safetensors.numpy.save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})


def adapter_paths(fns: ModelFns) -> tuple[set[str], set[str]]:
    """What an adapter can hold: paths of kernels in layers, and those of the head."""
    head, slots = configs.family_of(fns.config).HEAD, slots_of(fns).values()
    kernels = {slot.path for slot in slots if slot.layer is not None and slot.path.endswith("/kernel")}
    return kernels, {slot.path for slot in slots if re.match(head, slot.path)}


def _module(family: Any, name: str) -> str:
    """A tensor's name in memory, which for some families is not its name in the file."""
    for pattern, replacement in getattr(family, "MODULES", ()):
        name = re.sub(pattern, replacement, name)
    return name
