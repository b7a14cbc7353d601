"""The Llama family of decoders, as Hugging Face's `LlamaForCausalLM` and its near relatives.

Mistral and Qwen2 are the same computation: Qwen2 adds biases to query, key and value, and Mistral's
sliding window is refused where it would matter. Llama 2 and 3, TinyLlama and SmolLM2 are Llamas.

References:
  Touvron et al., LLaMA (2302.13971); Grattafiori et al., Llama 3 (2407.21783).
  Su et al., RoFormer, rotary positions (2104.09864); Zhang & Sennrich, RMSNorm (1910.07467);
  Ainslie et al., GQA (2305.13245); Shazeer, SwiGLU (2002.05202).
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fedgalore_jax.models import functional
from fedgalore_jax.models.functional import KEEP, TRANSPOSE, Cache, Decoder, ModelFns, Transform
from fedgalore_jax.models.layers import ACTIVATIONS, Linear, RMSNorm, attend, normal, together
from fedgalore_jax.types import Array, Batch, Params

PREFIX = "model."
HEAD = r"(?!)"  # matches nothing: a language model's head is never drawn anew
IGNORED = (
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.|lm_head\."  # old versions' buffers, a tied head's copy
)
COPIES = {"lm_head.weight": "model.embed_tokens.weight"}
"""What a tied model's file may hold once more."""
ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}


class Rope(NamedTuple):
    """Rotary positions: the fields of Hugging Face's `rope_parameters`, under their names.

    `linear` divides all frequencies by `factor`; `llama3` divides the low ones only, and blends in
    between: frequencies of less than `low_freq_factor` turns over the original context are low, of
    more than `high_freq_factor` high.
    """

    rope_type: str = "default"
    rope_theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def frequencies(self, width: int) -> np.ndarray:
        """Radians a position for each of `width // 2` pairs, in float64. [V] transformers 5."""
        plain = self.rope_theta ** -(np.arange(0, width, 2) / width)
        if self.rope_type != "llama3":
            return plain / self.factor
        turns = self.original_max_position_embeddings * plain / (2 * math.pi)
        high = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        high = np.clip(high, 0, 1)
        return high * plain + (1 - high) * plain / self.factor


ROPES = {
    "default": ("rope_type", "rope_theta"),
    "linear": ("rope_type", "rope_theta", "factor"),
    "llama3": Rope._fields,
}
"""The fields that each `rope_type` has."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of Hugging Face's `LlamaConfig` that the model needs, under their names.

    `rope` holds `rope_parameters`; `eos_token_id` is a tuple, because chat models end on several.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope: Rope
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    attention_dropout: float = 0.0
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: tuple = ()
    pad_token_id: int | None = None

    def __post_init__(self):
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act={self.hidden_act!r}: use one of {', '.join(ACTIVATIONS)}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < 1:
                raise ValueError(f"{field.name}={value} must be at least 1")
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads, head_dim even")

    @property
    def qkv_bias(self) -> bool:
        """Qwen2 always has these three biases, and no field for them."""
        return self.attention_bias or self.model_type == "qwen2"


def fields(raw: dict) -> dict:
    """The fields of `Config` in the content of a `config.json`, of any version of transformers.

    Raises:
      ValueError: what is set there and not supported.
    """
    model_type = raw["model_type"]
    window = raw.get("sliding_window", 4096)  # where the key is absent; null means none
    raw = {name: value for name, value in raw.items() if value is not None}
    if "num_attention_heads" in raw and "hidden_size" in raw:
        heads = raw["num_attention_heads"]
        raw = {"head_dim": raw["hidden_size"] // max(heads, 1)} | raw
        if model_type == "llama":
            raw = {"num_key_value_heads": heads} | raw
    if model_type != "llama":  # their biases are fixed, whatever is said there
        raw |= {"attention_bias": False, "mlp_bias": False}

    slides = {"llama": False, "mistral": True, "qwen2": raw.get("use_sliding_window", False)}[model_type]
    positions = raw.get("max_position_embeddings", 0)
    if slides and window is not None and window < positions:
        raise ValueError(
            f"sliding_window={window} is not supported: set max_position_embeddings={positions} to at most "
            f"{window}, where the window changes nothing"
        )

    # Version 4 wrote rope_theta beside an optional rope_scaling, whose rope_type was once called type.
    rope = {"rope_theta": raw.get("rope_theta", 10000.0)}
    rope |= raw.get("rope_scaling", {}) | raw.get("rope_parameters", {})
    rope.setdefault("rope_type", rope.get("type", "default"))
    if rope["rope_type"] not in ROPES:
        raise ValueError(f"rope_type={rope['rope_type']!r} is not supported: use one of {', '.join(ROPES)}")
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1)) != 1:
        raise ValueError("partial_rotary_factor is not supported: it must be 1")
    # Beside the others it counts more than among them.
    name = "original_max_position_embeddings"
    rope[name] = raw.get(name, rope.get(name, positions))
    if missing := [name for name in ROPES[rope["rope_type"]] if name not in rope]:
        raise ValueError(f"rope_parameters: {', '.join(missing)} is missing")
    kinds = {name: type(Rope._field_defaults[name]) for name in ROPES[rope["rope_type"]]}
    raw["rope"] = Rope(**{name: kind(rope[name]) for name, kind in kinds.items()})

    eos = raw.get("eos_token_id", ())
    return raw | {"eos_token_id": (eos,) if isinstance(eos, int) else tuple(eos)}


class Embeddings(nnx.Module):
    """Token embeddings. Parameters: `embed_tokens [V, D]`."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.hidden_size)
        self.embed_tokens = nnx.Param(config.initializer_range * normal(rngs.params(), shape))

    def __call__(self, tokens: Array) -> Array:
        """`[B, L]` to `[B, L, D]`."""
        return self.embed_tokens.get_value()[tokens]


def rotate(x: Array, angles: Array) -> Array:
    """Turns the pairs `(i, i + d / 2)` of `x [B, L, H, d]` by `angles [B, L, d / 2]`."""
    angles = angles[:, :, None]
    cos, sin = (jnp.broadcast_to(f(angles), (*x.shape[:-1], angles.shape[-1])) for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x.astype(angles.dtype), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Past(NamedTuple):
    """One layer's keys and values `[B, S, K, d]` so far, and the slot where the next ones go."""

    keys: Array
    values: Array
    slot: Array


class Attention(nnx.Module):
    """Causal attention in which groups of queries share a key and a value.

    Parameters: `query [D, H d]`, `key [D, K d]`, `value [D, K d]` and `output [H d, D]`.
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        linear = functools.partial(Linear, std=config.initializer_range, rngs=rngs)
        width, d = config.hidden_size, config.head_dim
        heads, groups = config.num_attention_heads * d, config.num_key_value_heads * d
        self.query = linear(width, heads, bias=config.qkv_bias)
        self.key, self.value = (linear(width, groups, bias=config.qkv_bias) for _ in range(2))
        self.output = linear(heads, width, bias=config.attention_bias)
        self.config = config

    def __call__(
        self, x: Array, angles: Array, mask: Array, past: Past | None, key: Array | None
    ) -> tuple[Array, tuple[Array, Array]]:
        """`[B, L, D]` to the same shape, and the new keys and values `[B, L, K, d]`."""
        heads = (*x.shape[:-1], -1, self.config.head_dim)
        q, k, v = (y.reshape(heads) for y in together(x, self.query, self.key, self.value))
        q, k = rotate(q, angles), rotate(k, angles)
        keys, values = k, v
        if past is not None:
            keys, values = (
                jax.lax.dynamic_update_slice_in_dim(old, new, past.slot, axis=1)
                for old, new in ((past.keys, k), (past.values, v))
            )
        rate = self.config.attention_dropout
        y = attend(q, keys, values, mask=mask, causal=past is None, rate=rate, key=key)
        return self.output(y.reshape(*x.shape[:-1], -1)), (k, v)


class Mlp(nnx.Module):
    """SwiGLU. Parameters: `gate [D, F]`, `up [D, F]` and `down [F, D]`."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        linear = functools.partial(Linear, std=config.initializer_range, bias=config.mlp_bias, rngs=rngs)
        sizes = config.hidden_size, config.intermediate_size
        self.gate, self.up, self.down = linear(*sizes), linear(*sizes), linear(*sizes[::-1])
        self.act = config.hidden_act

    def __call__(self, x: Array) -> Array:
        """`[B, L, D]` to the same shape."""
        gate, up = together(x, self.gate, self.up)
        return self.down(ACTIVATIONS[self.act](gate) * up)


class Layer(nnx.Module):
    """One pre-norm layer.

    Parameters: `input_layernorm`, `attention`, `post_attention_layernorm` and `mlp`.
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        norm = functools.partial(RMSNorm, config.hidden_size, eps=config.rms_norm_eps)
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        self.attention, self.mlp = Attention(config, rngs=rngs), Mlp(config, rngs=rngs)

    def extend(
        self, x: Array, angles: Array, mask: Array, past: Past | None = None, key: Array | None = None
    ) -> tuple[Array, tuple[Array, Array]]:
        """`[B, L, D]` to the same shape, and the keys and values of these tokens."""
        y, new = self.attention(self.input_layernorm(x), angles, mask, past, key)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), new

    def __call__(self, x: Array, angles: Array, mask: Array, *, key: Array | None = None) -> Array:
        """`[B, L, D]` to the same shape; `mask [B, L]` is False at padding."""
        return self.extend(x, angles, mask, key=key)[0]


def build(
    config: Config, *, precision: str = "float32", scan_layers: bool | None = None, remat: bool = False
) -> ModelFns:
    """The model of a configuration.

    Args:
      config: its sizes.
      precision: "float32", or "bf16" for products in bfloat16 with parameters as they are; norms,
        softmax, rotations and logits are in float32 or wider in both.
      scan_layers: one compiled layer for all, or one for each; None scans where there are many. No
        parameter's name or shape depends on it.
      remat: recompute each layer in the backward pass rather than keep its activations.

    Returns:
      `ModelFns` whose `apply` gives `[B, L, V]` for `inputs["input_ids"] [B, L]` and an optional
      `inputs["attention_mask"] [B, L]`, 0 at padding on either side; `decoder` gives them one by one.
      Parameters are `embeddings`, `layers` (stacked), `norm` and, where it isn't tied, `lm_head`.
    """
    width, std = config.hidden_size, config.initializer_range
    embeddings, layer = (functional.part(functools.partial(m, config)) for m in (Embeddings, Layer))
    norm = functional.part(functools.partial(RMSNorm, width, eps=config.rms_norm_eps))
    head = functional.part(functools.partial(Linear, width, config.vocab_size, std=std, bias=False))
    frequencies = config.rope.frequencies(config.head_dim)
    unroll = functional.unroll(config.num_hidden_layers, scan_layers)
    cast = functional.caster(precision)

    def init(key: Array) -> Params:
        keys = jax.random.split(key, 4)
        params = {
            "embeddings": embeddings.init(keys[0]),
            "layers": functional.init_stack(layer, keys[1], config.num_hidden_layers),
            "norm": norm.init(keys[2]),
        }
        return params if config.tie_word_embeddings else params | {"lm_head": head.init(keys[3])}

    def embed(params: Params, tokens: Array, positions: Array) -> tuple[Array, Array]:
        x = embeddings.bind(params["embeddings"])(tokens)
        x = cast(x)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        # A product with one axis of length 1 on each side: ranks are never promoted silently.
        return x, positions[..., None].astype(wide) * jnp.asarray(frequencies, wide)[None, None]

    def unembed(params: Params, x: Array) -> Array:
        x = norm.bind(params["norm"])(x)
        tied = config.tie_word_embeddings
        weights = {"kernel": params["embeddings"]["embed_tokens"].T} if tied else params["lm_head"]
        return head.bind(weights)(x, jnp.promote_types(x.dtype, jnp.float32))

    def apply(params: Params, inputs: Batch, *, key: Array | None = None) -> Array:
        mask = _real(inputs)
        x, angles = embed(params, inputs["input_ids"], _positions(mask))
        here = layer._replace(bind=lambda p: functools.partial(layer.bind(p), angles=angles, mask=mask))
        x = functional.apply_stack(here, params["layers"], x, key=key, unroll=unroll, remat=remat)
        return unembed(params, x)

    def prefill(params: Params, inputs: Batch, room: int) -> tuple[Array, Cache]:
        mask = _real(inputs)
        x, angles = embed(params, inputs["input_ids"], _positions(mask))

        def extend(x, weights):
            return layer.bind(weights).extend(x, angles, mask)

        x, (keys, values) = jax.lax.scan(extend, x, params["layers"], unroll=unroll)
        pad = [(0, 0), (0, 0), (0, room), (0, 0), (0, 0)]
        mask = jnp.pad(mask, pad[1:3])
        cache = Cache(jnp.pad(keys, pad), jnp.pad(values, pad), mask, jnp.int32(x.shape[1]))
        return unembed(params, x[:, -1]), cache

    def step(params: Params, tokens: Array, cache: Cache) -> tuple[Array, Cache]:
        insert = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=cache.slot)
        x, angles = embed(params, tokens[:, None], cache.mask.sum(-1, keepdims=True))
        mask = insert(cache.mask, jnp.ones_like(tokens[:, None], bool), axis=1)

        def extend(x, sliced):
            weights, keys, values = sliced
            return layer.bind(weights).extend(x, angles, mask, Past(keys, values, cache.slot))

        stacks = params["layers"], cache.keys, cache.values
        x, (keys, values) = jax.lax.scan(extend, x, stacks, unroll=unroll)
        keys, values = insert(cache.keys, keys, axis=2), insert(cache.values, values, axis=2)
        return unembed(params, x[:, 0]), Cache(keys, values, mask, cache.slot + 1)

    return ModelFns(config, init, apply, precision, Decoder(prefill, step))


def _real(inputs: Batch) -> Array:
    """`[B, L]`, False at padding."""
    tokens = inputs["input_ids"]
    return (
        inputs["attention_mask"].astype(bool) if "attention_mask" in inputs else jnp.ones_like(tokens, bool)
    )


def _positions(mask: Array) -> Array:
    """Each token's number among the real ones of its row, wherever the padding is."""
    return jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)


def table(config: Config) -> tuple[tuple[str, str, Transform], ...]:
    """Rows of our path (a regex), Hugging Face's name, and their view of our leaf."""
    del config
    layer = "model.layers.{layer}."
    names = {"query": "q", "key": "k", "value": "v", "output": "o"}
    linears = (
        *((f"layers/attention/{our}", f"{layer}self_attn.{their}_proj") for our, their in names.items()),
        (r"layers/mlp/(gate|up|down)", layer + r"mlp.\1_proj"),
        (r"lm_head", "lm_head"),
    )
    return (
        (r"embeddings/embed_tokens", "model.embed_tokens.weight", KEEP),
        (r"layers/(\w+_layernorm)/scale", layer + r"\1.weight", KEEP),
        (r"norm/scale", "model.norm.weight", KEEP),
        *((f"{ours}/kernel", f"{theirs}.weight", TRANSPOSE) for ours, theirs in linears),
        *((f"{ours}/bias", f"{theirs}.bias", KEEP) for ours, theirs in linears),
    )


def files(config: Config) -> dict[str, dict]:
    """The JSON files beside the weights, by name."""
    content = dataclasses.asdict(config)
    rope = content.pop("rope")
    extra = {"mistral": {"sliding_window": None}, "qwen2": {"use_sliding_window": False}}
    if config.model_type != "llama":
        del content["attention_bias"], content["mlp_bias"]  # theirs are fixed
    return {
        "config.json": content
        | extra.get(config.model_type, {})
        | {
            "architectures": [ARCHITECTURES[config.model_type]],
            "rope_parameters": {name: getattr(rope, name) for name in ROPES[rope.rope_type]},
            "eos_token_id": list(config.eos_token_id) or None,
        }
    }
