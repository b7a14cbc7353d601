"""BERT for sentence classification and regression, as `BertForSequenceClassification`.

References:
  Devlin et al., BERT (1810.04805).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fedgalore_jax import tree
from fedgalore_jax.models import functional
from fedgalore_jax.models.functional import KEEP, TRANSPOSE, ModelFns, Transform
from fedgalore_jax.models.layers import ACTIVATIONS, Attention, LayerNorm, Linear, dropout, normal
from fedgalore_jax.types import Array, Batch, Params

PREFIX = "bert."
HEAD = r"classifier/"
IGNORED = r"bert\.embeddings\.position_ids|cls\."  # a buffer of old versions, the pre-training heads


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of Hugging Face's `BertConfig` that the model needs, under their names.

    `labels` holds the values of `id2label` in order; one label is a regression. A negative
    `classifier_dropout` stands for `hidden_dropout_prob`.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    pad_token_id: int = 0
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float = -1.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    position_embedding_type: str = "absolute"
    is_decoder: bool = False
    labels: tuple = ("LABEL_0", "LABEL_1")

    def __post_init__(self):
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act={self.hidden_act!r}: use one of {', '.join(ACTIVATIONS)}")
        if self.position_embedding_type != "absolute":
            raise ValueError(f"position_embedding_type={self.position_embedding_type!r} is not 'absolute'")
        if self.is_decoder:
            raise ValueError("is_decoder=True masks what comes later, and here all is read: use an encoder")
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        for name in (*sizes, "max_position_embeddings", "type_vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError("hidden_size must be a multiple of num_attention_heads")

    @property
    def head_dropout(self) -> float:
        """The dropout before the classifier."""
        return self.hidden_dropout_prob if self.classifier_dropout < 0 else self.classifier_dropout


class Embeddings(nnx.Module):
    """The sum of word, position and token type embeddings, normalised.

    Parameters: `word_embeddings [V, D]`, `position_embeddings [P, D]`, `token_type_embeddings [T, D]`
    and `layernorm`.
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        def table(rows):
            shape = (rows, config.hidden_size)
            return nnx.Param(config.initializer_range * normal(rngs.params(), shape))

        self.word_embeddings = table(config.vocab_size)
        self.position_embeddings = table(config.max_position_embeddings)
        self.token_type_embeddings = table(config.type_vocab_size)
        self.layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.config = config

    def __call__(self, ids: Array, types: Array, positions: Array, *, key: Array | None = None) -> Array:
        """Three `[B, L]` to `[B, L, D]`."""
        x = self.word_embeddings.get_value()[ids] + self.token_type_embeddings.get_value()[types]
        x = self.layernorm(x + self.position_embeddings.get_value()[positions])
        return dropout(x, self.config.hidden_dropout_prob, key)


class Layer(nnx.Module):
    """One post-norm transformer layer.

    Parameters: `attention`, `attention_layernorm`, `intermediate [D, F]`, `output [F, D]` and
    `output_layernorm`.
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        width, std = config.hidden_size, config.initializer_range
        norm = functools.partial(LayerNorm, width, eps=config.layer_norm_eps)
        rate = config.attention_probs_dropout_prob
        self.attention = Attention(
            width, config.num_attention_heads, rate=rate, std=std, qkv_bias=True, rngs=rngs
        )
        self.intermediate = Linear(width, config.intermediate_size, std=std, rngs=rngs)
        self.output = Linear(config.intermediate_size, width, std=std, rngs=rngs)
        self.attention_layernorm, self.output_layernorm = norm(), norm()
        self.config = config

    def __call__(self, x: Array, mask: Array | None = None, *, key: Array | None = None) -> Array:
        """`[B, L, D]` to the same shape; `mask [B, L]` is False for padding."""
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        rate, act = self.config.hidden_dropout_prob, ACTIVATIONS[self.config.hidden_act]
        y = self.attention(x, mask, key=keys[0])
        x = self.attention_layernorm(x + dropout(y, rate, keys[1]))
        y = self.output(act(self.intermediate(x)))
        return self.output_layernorm(x + dropout(y, rate, keys[2]))


def positions(ids: Array) -> Array:
    """Positions of `ids [B, L]`: 0, 1, ... in every row, padding included."""
    return jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)


def encoder(
    config: Config,
    positions: Callable[[Array], Array],
    longest: int,
    precision: str,
    unroll: int,
    remat: bool,
) -> tuple[Callable[[Array], Params], Callable[..., Array]]:
    """Embeddings and layers, shared by the families that differ from BERT in positions and head.

    Args:
      config: the family's.
      positions: of `ids [B, L]`.
      longest: the most tokens that there are positions for.
      precision: as for `build`.
      unroll: as for `functional.apply_stack`.
      remat: as for `build`.

    Returns:
      `init(key) -> params` with `embeddings` and `layers`, and `encode(params, inputs, key=...)`, which
      gives the first token's hidden state `[B, D]` in float32 or wider.
    """
    embeddings, layer = (functional.part(functools.partial(m, config)) for m in (Embeddings, Layer))
    cast = functional.caster(precision)

    def init(key: Array) -> Params:
        first, second = jax.random.split(key)
        stack = functional.init_stack(layer, second, config.num_hidden_layers)
        return {"embeddings": embeddings.init(first), "layers": stack}

    def encode(params: Params, inputs: Batch, *, key: Array | None) -> Array:
        keys = (None, None) if key is None else jax.random.split(key)
        ids = inputs["input_ids"]
        if ids.shape[1] > longest:
            raise ValueError(f"input_ids {ids.shape} have more than {longest} tokens: truncate them")
        types, mask = inputs.get("token_type_ids", jnp.zeros_like(ids)), inputs.get("attention_mask")
        mask = None if mask is None else mask.astype(bool)
        x = cast(embeddings.bind(params["embeddings"])(ids, types, positions(ids), key=keys[0]))
        masked = layer._replace(bind=lambda weights: functools.partial(layer.bind(weights), mask=mask))
        x = functional.apply_stack(masked, params["layers"], x, key=keys[1], unroll=unroll, remat=remat)
        return tree.wide(x[:, 0])

    return init, encode


def build(
    config: Config, *, precision: str = "float32", scan_layers: bool | None = None, remat: bool = False
) -> ModelFns:
    """The model of a configuration.

    Args:
      config: its sizes.
      precision: what products run in, "float32" or "bf16"; see `ModelFns`.
      scan_layers: see `functional.unroll`. No parameter's name or shape depends on it.
      remat: compute each layer again in the backward pass instead of keeping what is inside it.

    Returns:
      `ModelFns` whose `apply` reads `input_ids [B, L]` and, where given, `attention_mask [B, L]` (0 for
      padding) and `token_type_ids [B, L]`. Parameters are `embeddings`, `layers` (stacked), `pooler`
      and `classifier`.
    """
    width, std = config.hidden_size, config.initializer_range
    unroll = functional.unroll(config.num_hidden_layers, scan_layers)
    start, encode = encoder(config, positions, config.max_position_embeddings, precision, unroll, remat)
    pooler, head = (
        functional.part(functools.partial(Linear, width, n, std=std)) for n in (width, len(config.labels))
    )

    def init(key: Array) -> Params:
        keys = jax.random.split(key, 3)
        return start(keys[0]) | {"pooler": pooler.init(keys[1]), "classifier": head.init(keys[2])}

    def apply(params: Params, inputs: Batch, *, key: Array | None = None) -> Array:
        keys = (None, None) if key is None else jax.random.split(key)
        x = jnp.tanh(pooler.bind(params["pooler"])(encode(params, inputs, key=keys[0])))
        return head.bind(params["classifier"])(dropout(x, config.head_dropout, keys[1]))

    return ModelFns(config, init, apply, precision)


def rows(prefix: str, heads: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str, Transform], ...]:
    """The table of the encoder under `prefix`, and of the `heads`: our path and their name of each."""
    layer, words = prefix + "encoder.layer.{layer}.", prefix + "embeddings."
    linears = (
        (r"layers/attention/(query|key|value)", layer + r"attention.self.\1"),
        (r"layers/attention/output", layer + "attention.output.dense"),
        (r"layers/(intermediate|output)", layer + r"\1.dense"),
        *heads,
    )
    norms = (
        (r"layers/attention_layernorm", layer + "attention.output.LayerNorm"),
        (r"layers/output_layernorm", layer + "output.LayerNorm"),
        (r"embeddings/layernorm", words + "LayerNorm"),
    )
    return (
        (r"embeddings/(\w+_embeddings)", words + r"\1.weight", KEEP),
        *((f"{ours}/kernel", f"{theirs}.weight", TRANSPOSE) for ours, theirs in linears),
        *((f"{ours}/scale", f"{theirs}.weight", KEEP) for ours, theirs in norms),
        *((f"{ours}/bias", f"{theirs}.bias", KEEP) for ours, theirs in linears + norms),
    )


def table(config: Config) -> tuple[tuple[str, str, Transform], ...]:
    """Rows of our path (a regex), Hugging Face's name, and their view of our leaf."""
    del config  # no layout depends on it
    return rows(PREFIX, (("pooler", "bert.pooler.dense"), ("classifier", "classifier")))


def files(config: Config, architecture: str = "BertForSequenceClassification") -> dict[str, dict]:
    """The JSON files beside the weights, by name; labels and the model type are added by `save`."""
    fields: dict[str, Any] = dataclasses.asdict(config) | {"architectures": [architecture]}
    return {"config.json": fields | {"classifier_dropout": config.head_dropout}}
