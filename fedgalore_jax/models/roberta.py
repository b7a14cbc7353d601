"""RoBERTa for sentence classification and regression, as `RobertaForSequenceClassification`.

References:
  Liu et al., RoBERTa (1907.11692).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from fedgalore_jax.models import bert, functional
from fedgalore_jax.models.functional import ModelFns, Transform
from fedgalore_jax.models.layers import Linear, dropout
from fedgalore_jax.types import Array, Batch, Params

PREFIX = "roberta."
HEAD = r"classifier/"
IGNORED = r"roberta\.(pooler\.|embeddings\.position_ids)|lm_head\."  # not used in classification


@dataclasses.dataclass(frozen=True)
class Config(bert.Config):
    """The fields of Hugging Face's `RobertaConfig`; see `bert.Config`."""

    pad_token_id: int = 1


class Head(nnx.Module):
    """The classifier on the first token's state. Parameters: `dense [D, D]` and `out_proj [D, n]`."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        width = config.hidden_size
        linear = functools.partial(Linear, width, std=config.initializer_range, rngs=rngs)
        self.dense, self.out_proj = linear(width), linear(len(config.labels))
        self.rate = config.head_dropout

    def __call__(self, x: Array, *, key: Array | None = None) -> Array:
        """`[B, D]` to `[B, n]`."""
        keys = (None, None) if key is None else jax.random.split(key)
        x = jnp.tanh(self.dense(dropout(x, self.rate, keys[0])))
        return self.out_proj(dropout(x, self.rate, keys[1]))


def positions(pad: int, ids: Array) -> Array:
    """Positions of `ids [B, L]`: `pad + 1`, `pad + 2`, ... for words, and `pad` for padding."""
    real = ids != pad
    return pad + jnp.where(real, jnp.cumsum(real, axis=1), 0)


def build(
    config: Config, *, precision: str = "float32", scan_layers: bool | None = None, remat: bool = False
) -> ModelFns:
    """The model of a configuration; arguments and inputs as `bert.build`'s.

    Returns:
      `ModelFns` with the parameters `embeddings`, `layers` (stacked) and `classifier`.
    """
    unroll = functional.unroll(config.num_hidden_layers, scan_layers)
    where = functools.partial(positions, config.pad_token_id)
    longest = config.max_position_embeddings - config.pad_token_id - 1
    start, encode = bert.encoder(config, where, longest, precision, unroll, remat)
    head = functional.part(functools.partial(Head, config))

    def init(key: Array) -> Params:
        keys = jax.random.split(key)
        return start(keys[0]) | {"classifier": head.init(keys[1])}

    def apply(params: Params, inputs: Batch, *, key: Array | None = None) -> Array:
        keys = (None, None) if key is None else jax.random.split(key)
        return head.bind(params["classifier"])(encode(params, inputs, key=keys[0]), key=keys[1])

    return ModelFns(config, init, apply, precision)


def table(config: Config) -> tuple[tuple[str, str, Transform], ...]:
    """Rows of our path (a regex), Hugging Face's name, and their view of our leaf."""
    del config  # no layout depends on it
    return bert.rows(PREFIX, ((r"classifier/(dense|out_proj)", r"classifier.\1"),))


def files(config: Config) -> dict[str, dict]:
    """The JSON files beside the weights, by name; labels and the model type are added by `save`."""
    return bert.files(config, "RobertaForSequenceClassification")
