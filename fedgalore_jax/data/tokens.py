"""Texts to token ids: a model's own tokenizer, cut to its positions, kept on disk."""

import hashlib
import json
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fedgalore_jax.data import buckets
from fedgalore_jax.data.cache import Arrays, Empty, cached
from fedgalore_jax.data.padded import Padded, Rows

FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
)
SETTINGS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
)

MANY = 2**31 - 1
"""Where a `config.json` names no limit."""


class Encoded(NamedTuple):
    """Token ids of n texts, ragged.

    Attributes:
      ids: of all texts, end to end, int32.
      types: token types (0 first, 1 second sentence) likewise.
      ends: `[n]`, where each text ends.
      cut: how many texts were longer than allowed.
    """

    ids: np.ndarray
    types: np.ndarray
    ends: np.ndarray
    cut: int


def tokenizer(model: pathlib.Path) -> Any:
    """The tokenizer of a model directory.

    Raises:
      ImportError: `transformers` is not installed.
      FileNotFoundError: the directory has no tokenizer; names the files looked for.
      ValueError: it has one that cannot be read.
    """
    if not any((model / name).exists() for name in FILES):
        raise FileNotFoundError(f"{model} has no tokenizer: it needs one of {', '.join(FILES)}")
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError("tokenizers come with transformers: pip install 'transformers>=5.17,<6'") from error
    try:
        return AutoTokenizer.from_pretrained(model)
    except ImportError:
        raise
    except Exception as error:  # damage shows as whatever transformers stumbles over
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"the tokenizer of {model} cannot be read ({reason}): copy its files again"
        ) from error


def copy(model: pathlib.Path, to: pathlib.Path) -> None:
    """Puts a model directory's tokenizer, where it has one, beside a trained model's weights."""
    for name in (*FILES, *SETTINGS, "generation_config.json"):
        if (model / name).is_file():
            shutil.copyfile(model / name, to / name)


def positions(model: pathlib.Path) -> int:
    """Tokens that a model's positions allow, by its `config.json`."""
    config = _config(model)
    most = config.get("max_position_embeddings", MANY)
    # RoBERTa counts positions from the padding token's id + 1 (models/roberta in transformers) [V].
    if config.get("model_type") in ("roberta", "xlm-roberta", "camembert"):
        return most - config.get("pad_token_id", 1) - 1
    return most


def vocabulary(model: pathlib.Path) -> int:
    """Tokens that a model knows, by its `config.json`."""
    return _config(model).get("vocab_size", MANY)


def check(model: pathlib.Path, ids: np.ndarray, types: np.ndarray | None = None) -> None:
    """Sees that a model knows these tokens and token types: JAX would take others in their place.

    Raises:
      ValueError: it does not.
    """
    if (most := ids.max()) >= (size := vocabulary(model)):
        raise ValueError(
            f"the tokenizer of {model} gives token {most}, and its config.json has vocab_size={size}:"
            " copy the model's own tokenizer, or resize the model"
        )
    if types is not None and (most := types.max()) >= (size := _config(model).get("type_vocab_size", MANY)):
        raise ValueError(
            f"the tokenizer of {model} gives token type {most}, and its config.json has"
            f" type_vocab_size={size}: give one column of texts, or choose another model"
        )


def _config(model: pathlib.Path) -> dict[str, Any]:
    path = model / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: choose a model directory in Hugging Face's layout")
    return json.loads(path.read_text(encoding="utf-8"))


def encode(
    model: pathlib.Path,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    max_length: int,
    cache: pathlib.Path | None,
) -> Encoded:
    """Tokenises texts with a model's special tokens, or reads what an earlier call kept.

    Args:
      model: its directory.
      texts: n of them.
      pairs: the second sentence of each, or None.
      max_length: tokens at most, special ones included; longer texts are cut as the tokenizer does it.
      cache: folder, or None.

    Returns:
      An `Encoded`.

    Raises:
      ValueError: nothing but special tokens fits, or the model does not know a token.
    """

    def compute(_: Empty) -> Arrays:
        own = tokenizer(model)
        special = own.num_special_tokens_to_add(pair=pairs is not None)
        if max_length <= special:
            raise ValueError(
                f"max_length={max_length} leaves no room for text: {special} tokens of a sample are special"
            )
        whole = _call(own, texts, pairs)
        long = [i for i, ids in enumerate(whole["input_ids"]) if len(ids) > max_length]
        if long:
            short = _call(
                own, [texts[i] for i in long], pairs and [pairs[i] for i in long],
                truncation=True, max_length=max_length,
            )  # fmt: skip
            for field, rows in whole.items():
                for i, row in zip(long, short[field], strict=True):
                    rows[i] = row
        ids = whole["input_ids"]
        types = whole.get("token_type_ids", [[0] * len(row) for row in ids])
        return {
            "ids": _flat(ids),
            "types": _flat(types),
            "ends": np.cumsum([len(row) for row in ids]),
            "cut": np.array(len(long)),
        }

    arrays = cached(
        cache, (fingerprint(model), "encode", max_length, list(texts), pairs and list(pairs)), compute
    )
    check(model, arrays["ids"], arrays["types"])
    return Encoded(arrays["ids"], arrays["types"], arrays["ends"], int(arrays["cut"]))


def _call(own: Any, texts: Sequence[str], pairs: Sequence[str] | None, **options: Any) -> dict[str, list]:
    options = {"add_special_tokens": True, "verbose": False, "return_attention_mask": False} | options
    return dict(own(list(texts), pairs and list(pairs), **options))


def _flat(rows: list) -> np.ndarray:
    return np.concatenate([np.asarray(row, np.int32) for row in rows])


def special(model: pathlib.Path) -> tuple[int, bool]:
    """The padding token's id, and whether the model takes token types."""
    own = tokenizer(model)
    if own.pad_token_id is None:
        raise ValueError(f"the tokenizer of {model} has no pad_token: name one in tokenizer_config.json")
    return own.pad_token_id, "token_type_ids" in own.model_input_names


def batch(encoded: Encoded, pad: int, with_types: bool, most: int) -> dict[str, Rows]:
    """Model inputs `[n, L]`, padded on the right to the bucket of the longest text, `most` tokens at most."""
    lengths = np.diff(encoded.ends, prepend=0)
    rows = encoded.ends - lengths, lengths, min(buckets.bucket(lengths.max()), most)
    types: dict[str, Rows] = {"token_type_ids": Padded(encoded.types, *rows, 0)} if with_types else {}
    return inputs(encoded.ids, *rows, pad) | types


def inputs(ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray, width: int, pad: int) -> dict[str, Rows]:
    """Token ids and their mask, see `Padded`."""
    ones = np.broadcast_to(np.int32(1), ids.shape)  # one number in memory
    mask = Padded(ones, starts, lengths, width, 0)
    return {"input_ids": Padded(ids, starts, lengths, width, pad), "attention_mask": mask}


def fingerprint(model: pathlib.Path) -> str:
    """A hash of everything in a model directory that decides its tokens."""
    digest = hashlib.sha256()
    for name in (*FILES, *SETTINGS):
        if (model / name).is_file():
            digest.update(name.encode() + (model / name).read_bytes())
    return digest.hexdigest()
