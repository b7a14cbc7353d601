"""Models of three small layers whose every parameter matters, and their twins in torch."""

import dataclasses
import functools
import importlib.resources
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedgalore_jax import tree
from fedgalore_jax.models import bert, configs, deit, roberta, vit
from fedgalore_jax.types import Adapted

CONFIG = vit.Config(
    hidden_size=12,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=20,
    image_size=6,
    patch_size=2,
    num_channels=3,
    initializer_range=0.3,  # large enough that every layer matters
    labels=("cat", "dog", "eel", "fox", "gnu"),
)
_TEXT = dict(
    vocab_size=30,
    hidden_size=12,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=20,
    max_position_embeddings=16,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    initializer_range=0.3,
    labels=CONFIG.labels,
)
BERT, ROBERTA = bert.Config(**_TEXT), roberta.Config(**_TEXT, pad_token_id=2)
DEIT = deit.Config(**dataclasses.asdict(CONFIG))
SHIPPED = importlib.resources.files("fedgalore_jax.models") / "digits_vit"
KEY = jax.random.key(0)
CLIENTS, BATCH, RANK = 3, 4, 2


def pixels(seed=1, config=CONFIG):
    shape = (BATCH, config.image_size, config.image_size, config.num_channels)
    return jax.random.normal(jax.random.key(seed), shape)


def batch_of(config):
    """Inputs of any family; in text, rows of different lengths, padded, with two token types."""
    if isinstance(config, vit.Config):
        return {"pixel_values": pixels(config=config)}
    rng, length = np.random.default_rng(1), 9
    real = np.arange(length) < np.array([[9], [4], [7], [1]])
    ids = np.where(real, rng.integers(5, config.vocab_size, real.shape), config.pad_token_id)
    types = (np.arange(length) > 3) & real
    return {
        "input_ids": jnp.asarray(ids, jnp.int32),
        "attention_mask": jnp.asarray(real, jnp.int32),
        "token_type_ids": jnp.asarray(types, jnp.int32),
    }


@functools.cache
def model(config=CONFIG):
    """Scanned, which compiles sooner than unrolled; no bias is 0 and no scale 1, as init has them."""
    family, rng = configs.family_of(config), np.random.default_rng(2)
    fns = family.build(config, scan_layers=True)
    shapes = jax.eval_shape(fns.init, KEY)
    return fns, jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), shapes)


@functools.cache
def forward(fns):
    return jax.jit(lambda params, images, key: fns.apply(params, {"pixel_values": images}, key=key))


def logits_of(fns, params, images=None, key=None):
    return forward(fns)(params, pixels() if images is None else images, key)


def factors(params, clients=()):
    """Random factors for every kernel of every layer, `{path: (a, b, shrink)}`, clients in front."""
    rng = np.random.default_rng(3)
    drawn = {}
    for path, kernel in tree.flatten(params).items():
        if path.startswith("layers/") and path.endswith("kernel"):
            depth, m, n = kernel.shape
            shapes = (*clients, depth, m, RANK), (*clients, depth, RANK, n), (*clients, depth)
            drawn[path] = tuple(jnp.asarray(0.3 * rng.normal(size=s), jnp.float32) for s in shapes)
    return drawn


def adapted(params, factors):
    flat = tree.flatten(params)
    return tree.unflatten(flat | {path: Adapted(flat[path], *parts) for path, parts in factors.items()})


def close(ours, theirs, atol=1e-5):
    theirs = theirs.detach().numpy() if hasattr(theirs, "detach") else theirs
    np.testing.assert_allclose(ours, theirs, atol=atol, rtol=0)


def torch_model(path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    (architecture,) = json.loads((path / "config.json").read_text())["architectures"]
    loaded, info = getattr(transformers, architecture).from_pretrained(
        path, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    return loaded.eval()


def to_torch(inputs):
    """Inputs as keyword arguments of the torch model."""
    import torch

    arrays = {name: np.array(x) for name, x in inputs.items()}
    return {
        name: torch.tensor(x.transpose(0, 3, 1, 2).copy() if x.ndim == 4 else x) for name, x in arrays.items()
    }
