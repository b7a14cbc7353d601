"""`config.json` to a family's frozen `Config`, and back."""

import dataclasses
import json
import pathlib
import typing
from typing import Any

from fedgalore_jax.models import bert, deit, llama, roberta, vit

FAMILIES = {
    "bert": bert,
    "deit": deit,
    "llama": llama,
    "mistral": llama,
    "qwen2": llama,
    "roberta": roberta,
    "vit": vit,
}
"""Hugging Face's `model_type` to the module that knows the family."""

CONFIG, PREPROCESSOR, GENERATION = "config.json", "preprocessor_config.json", "generation_config.json"
DROPOUTS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "attention_dropout",
)


def read(path: pathlib.Path, num_labels: int | None, dropout: float | None) -> tuple[Any, Any]:
    """The family's module and its filled-in `Config`.

    Args:
      path: a Hugging Face directory.
      num_labels: replaces the labels where it differs from their number; decoders have none.
      dropout: replaces all dropout probabilities.

    Raises:
      ValueError: one line that names the file, all that is wrong with it, and the remedy.
    """
    if dropout is not None and not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} is not in [0, 1)")
    file = path / CONFIG
    raw = _read_json(file)
    family = FAMILIES.get(raw.get("model_type", ""))
    if family is None:
        raise ValueError(
            f"{file}: model_type={raw.get('model_type')!r} is not supported: use one of {', '.join(FAMILIES)}"
        )
    if (path / PREPROCESSOR).exists():
        raw = _read_json(path / PREPROCESSOR) | raw
    if (path / GENERATION).exists():  # how a chat model ends is said there
        raw |= _read_json(path / GENERATION)
    try:
        labels = raw.get("id2label") or _numbered(raw.get("num_labels", 2))
        if num_labels not in (None, len(labels)):
            labels = _numbered(num_labels)
        raw["labels"] = [labels[i] for i in sorted(labels, key=int)]
        if dropout is not None:
            raw |= dict.fromkeys(DROPOUTS, dropout)
        return family, _fill(family.Config, family.fields(raw) if hasattr(family, "fields") else raw)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}: correct it, or copy it again") from error


def family_of(config: Any) -> Any:
    """The module whose `Config` this is, None for a model of your own."""
    return next((f for f in FAMILIES.values() if type(config) is f.Config), None)


def is_decoder(path: pathlib.Path) -> bool:
    """Whether a directory's model continues text; others classify."""
    return not hasattr(read(path, None, None)[1], "labels")


def to_json(config: Any) -> dict[str, dict]:
    """The JSON files that belong beside the weights, by name."""
    family = family_of(config)
    model_type = next(t for t, f in FAMILIES.items() if f is family)
    files = family.files(config)
    files[CONFIG].setdefault("model_type", model_type)
    if labels := files[CONFIG].pop("labels", ()):
        files[CONFIG]["id2label"] = {str(i): label for i, label in enumerate(labels)}
        files[CONFIG]["label2id"] = {label: i for i, label in enumerate(labels)}
    return files


def _numbered(count: int) -> dict[str, str]:
    if count < 1:
        raise ValueError(f"num_labels={count} is not positive")
    return {str(i): f"LABEL_{i}" for i in range(count)}


def _fill(cls: type, raw: dict) -> Any:
    """Fills in a dataclass; keys it does not know are left out, all problems raised at once."""
    values, problems = {}, []
    for field in dataclasses.fields(cls):
        if field.name not in raw:
            if field.default is dataclasses.MISSING:
                problems.append(f"{field.name} is missing")
            continue
        value, kinds = raw[field.name], typing.get_args(field.type) or (field.type,)
        if value is None and field.default is not dataclasses.MISSING and type(None) not in kinds:
            continue  # JSON's null is "not given"
        if field.type is tuple and isinstance(value, list):
            value = tuple(value)
        if field.type is float and type(value) is int:
            value = float(value)
        if type(value) not in kinds:
            problems.append(
                f"{field.name}={value!r} is not of type {getattr(field.type, '__name__', field.type)}"
            )
        values[field.name] = value
    if problems:
        raise ValueError(", ".join(problems))
    return cls(**values)


def _read_json(file: pathlib.Path) -> dict:
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist: name a Hugging Face directory") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({error}): copy it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object: copy it again")
    return content
