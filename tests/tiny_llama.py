"""Decoders of three small layers whose every parameter matters, and their twins in torch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedgalore_jax.models import llama

LLAMA3 = llama.Rope("llama3", 10000.0, 8.0, 1.0, 4.0, 16)  # so short that all three bands exist
LLAMA = llama.Config(
    model_type="llama",
    vocab_size=61,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    rope=LLAMA3,
    attention_bias=True,
    mlp_bias=True,
    bos_token_id=1,
    pad_token_id=0,
)
TIED = dataclasses.replace(LLAMA, tie_word_embeddings=True, attention_bias=False, mlp_bias=False)
MISTRAL = dataclasses.replace(
    TIED, model_type="mistral", tie_word_embeddings=False, rope=llama.Rope(rope_theta=100.0)
)
QWEN2 = dataclasses.replace(
    TIED, model_type="qwen2", num_key_value_heads=4, head_dim=4, rope=llama.Rope("linear", 10000.0, 4.0)
)
CONFIGS = {"llama": LLAMA, "tied": TIED, "mistral": MISTRAL, "qwen2": QWEN2}
LENGTHS = (9, 1, 5, 7, 3, 8, 2, 6)
KEY = jax.random.key(0)


@functools.cache
def model(config=LLAMA, **options):
    """Scanned, which compiles sooner than unrolled; no bias is 0 and no scale 1, as init has them."""
    fns, rng = llama.build(config, scan_layers=True, **options), np.random.default_rng(2)
    shapes = jax.eval_shape(fns.init, KEY)
    return fns, jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), shapes)


def prompts(side="left", seed=1, vocabulary=LLAMA.vocab_size, lengths=LENGTHS):
    """Eight prompts of different lengths, `[8, 9]`, padded on one side with random tokens."""
    rng, longest = np.random.default_rng(seed), max(lengths)
    mask = np.arange(longest)[None] >= longest - np.array(lengths)[:, None]
    tokens = rng.integers(1, vocabulary, mask.shape)
    if side == "right":
        rolled = [np.roll(t, n - longest) for t, n in zip(tokens, lengths, strict=True)]
        tokens, mask = np.stack(rolled), mask[:, ::-1]
    return {"input_ids": jnp.asarray(tokens, jnp.int32), "attention_mask": jnp.asarray(mask, jnp.int32)}


@functools.cache
def forward(fns):
    return jax.jit(lambda params, inputs: fns.apply(params, inputs))


def torch_model(path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    return loaded.eval()


def to_torch(inputs):
    """Torch's forward takes positions from nobody: they are the mask's, as its `generate` makes them."""
    import torch

    tensors = {name: torch.tensor(np.asarray(x), dtype=torch.long) for name, x in inputs.items()}
    positions = (tensors["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return tensors | {"position_ids": positions}
