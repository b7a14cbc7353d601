"""Vision Transformer for image classification, as Hugging Face's `ViTForImageClassification`.

References:
  Dosovitskiy et al., An Image is Worth 16x16 Words (2010.11929).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from fedgalore_jax import tree
from fedgalore_jax.models import functional
from fedgalore_jax.models.functional import KEEP, TRANSPOSE, ModelFns, Transform
from fedgalore_jax.models.layers import ACTIVATIONS, Attention, LayerNorm, Linear, dropout, normal
from fedgalore_jax.types import Array, Batch, Params

PREFIX = "vit."
HEAD = r"classifier/"
IGNORED = r"vit\.pooler\."  # a bare ViTModel has one; classification reads the CLS token itself

MODULES = (
    (r"encoder\.layer\.", "layers."),
    (r"attention\.attention\.(query|key|value)", lambda match: f"attention.{match[1][0]}_proj"),
    (r"attention\.output\.dense", "attention.o_proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"output\.dense", "mlp.fc2"),
)
"""The file's names to those in memory since transformers 5, in this order."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of Hugging Face's `ViTConfig` that the model needs, under their names.

    `labels` holds the values of `id2label` in order; `image_mean` and `image_std` come from
    `preprocessor_config.json`, one number for each channel or one for all: pixels in [0, 1] enter the
    model as `(x - mean) / std`.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    image_size: int
    patch_size: int
    num_channels: int = 3
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    qkv_bias: bool = True
    image_mean: tuple = (0.5, 0.5, 0.5)
    image_std: tuple = (0.5, 0.5, 0.5)
    labels: tuple = ("LABEL_0", "LABEL_1")

    special_tokens = ("cls_token",)  # of the family, in front of the patches

    def __post_init__(self):
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act={self.hidden_act!r}: use one of {', '.join(ACTIVATIONS)}")
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        for name in (*sizes, "image_size", "patch_size", "num_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.hidden_size % self.num_attention_heads or self.image_size % self.patch_size:
            raise ValueError(
                "hidden_size must be a multiple of num_attention_heads, image_size of patch_size"
            )


def fields(raw: dict) -> dict:
    """The fields of `Config` in the contents of `config.json` and `preprocessor_config.json`.

    How the processor rescales and normalises is one affine map, which `image_mean` and `image_std` hold.
    """
    given = {name: value for name, value in raw.items() if value is not None}
    channels = given.get("num_channels", 3)
    mean, std = (given.get(name, (0.5,) * channels) for name in ("image_mean", "image_std"))
    if not given.get("do_normalize", True):
        mean, std = (0.0,) * channels, (1.0,) * channels
    scale = 255 * (given.get("rescale_factor", 1 / 255) if given.get("do_rescale", True) else 1)
    if scale != 1:
        mean, std = ([x / scale for x in part] for part in (mean, std))
    return raw | {"image_mean": mean, "image_std": std}


class Embeddings(nnx.Module):
    """Patches to tokens, with special tokens in front and positions added.

    Parameters: `projection` (a `Linear` of `[p * p * channels, D]`), `[1, 1, D]` for each of
    `config.special_tokens`, such as `cls_token`, and `position_embeddings [1, L, D]`.
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        width, std, p = config.hidden_size, config.initializer_range, config.patch_size
        patches = (config.image_size // p) ** 2

        def token(count):
            return nnx.Param(std * normal(rngs.params(), (1, count, width)))

        self.projection = Linear(p * p * config.num_channels, width, std=std, rngs=rngs)
        for name in config.special_tokens:
            setattr(self, name, token(1))
        self.position_embeddings = token(patches + len(config.special_tokens))
        self.config = config

    def __call__(self, pixels: Array, *, key: Array | None = None) -> Array:
        """`[B, image_size, image_size, channels]` to `[B, L, D]`; bytes are normalised first."""
        special = [getattr(self, name).get_value() for name in self.config.special_tokens]
        positions = self.position_embeddings.get_value()
        batch, *image = pixels.shape
        size, p, channels = self.config.image_size, self.config.patch_size, self.config.num_channels
        if image != [size, size, channels]:
            raise ValueError(
                f"pixel_values {pixels.shape} are not [B, {size}, {size}, {channels}]: choose a model for"
                " images of that size, or resize them"
            )
        if pixels.dtype == jnp.uint8:  # an image as it was stored, a quarter of the memory of floats
            for name in ("image_mean", "image_std"):  # floats came normalised, and need neither
                if len(value := getattr(self.config, name)) not in (1, channels):
                    raise ValueError(f"{name}={value}: give one number for each of {channels} channels")
            mean, std = (
                jnp.array(x, jnp.float32).reshape(1, 1, 1, -1)
                for x in (self.config.image_mean, self.config.image_std)
            )
            pixels = (pixels.astype(jnp.float32) / 255 - mean) / std
        # A convolution whose stride is its size is a product over unfolded patches.
        grid = pixels.astype(positions.dtype).reshape(batch, size // p, p, size // p, p, channels)
        patches = grid.swapaxes(2, 3).reshape(batch, -1, p * p * channels)
        special = [jnp.broadcast_to(token, (batch, *token.shape[1:])) for token in special]
        tokens = jnp.concatenate([*special, self.projection(patches)], axis=1)
        return dropout(tokens + positions, self.config.hidden_dropout_prob, key)


class Layer(nnx.Module):
    """One pre-norm transformer layer.

    Parameters: `layernorm_before`, `attention`, `layernorm_after`, `intermediate [D, F]` and
    `output [F, D]`.
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        width, std = config.hidden_size, config.initializer_range
        norm = functools.partial(LayerNorm, width, eps=config.layer_norm_eps)
        self.layernorm_before, self.layernorm_after = norm(), norm()
        rate, bias = config.attention_probs_dropout_prob, config.qkv_bias
        self.attention = Attention(
            width, config.num_attention_heads, rate=rate, std=std, qkv_bias=bias, rngs=rngs
        )
        self.intermediate = Linear(width, config.intermediate_size, std=std, rngs=rngs)
        self.output = Linear(config.intermediate_size, width, std=std, rngs=rngs)
        self.config = config

    def __call__(self, x: Array, *, key: Array | None = None) -> Array:
        """`[B, L, D]` to the same shape."""
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        rate, act = self.config.hidden_dropout_prob, ACTIVATIONS[self.config.hidden_act]
        y = self.attention(self.layernorm_before(x), key=keys[0])
        x = x + dropout(y, rate, keys[1])
        y = self.output(act(self.intermediate(self.layernorm_after(x))))
        return x + dropout(y, rate, keys[2])


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
      `ModelFns` whose `apply` reads `inputs["pixel_values"] [B, image_size, image_size, channels]`,
      and whose parameters are `embeddings`, `layers` (stacked), `layernorm` and `classifier`.
    """
    width, std, depth = config.hidden_size, config.initializer_range, config.num_hidden_layers
    embeddings, layer = (functional.part(functools.partial(m, config)) for m in (Embeddings, Layer))
    norm = functional.part(functools.partial(LayerNorm, width, eps=config.layer_norm_eps))
    head = functional.part(functools.partial(Linear, width, len(config.labels), std=std))
    cast, unroll = functional.caster(precision), functional.unroll(depth, scan_layers)

    def init(key: Array) -> Params:
        keys = jax.random.split(key, 4)
        return {
            "embeddings": embeddings.init(keys[0]),
            "layers": functional.init_stack(layer, keys[1], depth),
            "layernorm": norm.init(keys[2]),
            "classifier": head.init(keys[3]),
        }

    def apply(params: Params, inputs: Batch, *, key: Array | None = None) -> Array:
        keys = (None, None) if key is None else jax.random.split(key)
        embed = embeddings.bind(jax.tree.map(cast, params["embeddings"]))
        x = embed(inputs["pixel_values"], key=keys[0])
        x = functional.apply_stack(layer, params["layers"], x, key=keys[1], unroll=unroll, remat=remat)
        return head.bind(params["classifier"])(norm.bind(params["layernorm"])(tree.wide(x[:, 0])))

    return ModelFns(config, init, apply, precision)


def table(config: Config, prefix: str = PREFIX) -> tuple[tuple[str, str, Transform], ...]:
    """Rows of our path (a regex), Hugging Face's name, and their view of our leaf."""
    p, channels = config.patch_size, config.num_channels

    def fold(kernel):
        return kernel.reshape(p, p, channels, -1).transpose(3, 2, 0, 1)

    layer, embeddings = prefix + "encoder.layer.{layer}.", prefix + "embeddings."
    patches = embeddings + "patch_embeddings.projection."
    linears = (
        (r"layers/attention/(query|key|value)", layer + r"attention.attention.\1"),
        (r"layers/attention/output", layer + "attention.output.dense"),
        (r"layers/(intermediate|output)", layer + r"\1.dense"),
        (r"(classifier)", r"\1"),
    )
    norms = ((r"layers/(layernorm_\w+)", layer + r"\1"), (r"(layernorm)", prefix + r"\1"))
    return (
        (r"embeddings/(\w+_token|position_embeddings)", embeddings + r"\1", KEEP),
        (r"embeddings/projection/kernel", patches + "weight", fold),
        (r"embeddings/projection/bias", patches + "bias", KEEP),
        *((f"{ours}/kernel", f"{theirs}.weight", TRANSPOSE) for ours, theirs in linears),
        *((f"{ours}/scale", f"{theirs}.weight", KEEP) for ours, theirs in norms),
        *((f"{ours}/bias", f"{theirs}.bias", KEEP) for ours, theirs in linears + norms),
    )


def files(config: Config, name: str = "ViT") -> dict[str, dict]:
    """The JSON files beside the weights, by name; labels and the model type are added by `save`."""
    fields = dataclasses.asdict(config)
    mean, std = fields.pop("image_mean"), fields.pop("image_std")
    return {
        "config.json": fields | {"architectures": [f"{name}ForImageClassification"]},
        "preprocessor_config.json": {
            "image_processor_type": f"{name}ImageProcessor",
            "do_resize": True,
            "size": {"height": config.image_size, "width": config.image_size},
            "resample": 2,  # bilinear; DeiT's processor is bicubic and crops where it is not told
            "do_center_crop": False,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": mean,
            "image_std": std,
        },
    }
