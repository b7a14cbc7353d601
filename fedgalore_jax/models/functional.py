"""What a model family offers the rest of the library: pure functions over plain nested dicts.

NNX modules *define* one part of a model (the embeddings, one layer, the head); this file turns such
a definition into pure functions, and no module, variable or rng ever leaves `models/`. Modules hold
no rng: a key enters at the call, so that vmapped clients cannot share a dropout mask by accident.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from fedgalore_jax import tree
from fedgalore_jax.config import PRECISIONS
from fedgalore_jax.types import Array, Batch, Params


class Cache(NamedTuple):
    """What a decoder remembers of the tokens so far, with room for more: S slots for each row.

    Attributes:
      keys: `[depth, B, S, K, d]`, rotated.
      values: `[depth, B, S, K, d]`.
      mask: `[B, S]` booleans, True where a slot holds a real token (not padding, not yet to come).
      slot: the slot of the next token, the same for all rows; int32.
    """

    keys: Array
    values: Array
    mask: Array
    slot: Array


class Decoder(NamedTuple):
    """A model of text that goes on one token at a time.

    Attributes:
      prefill: `prefill(params, inputs, room) -> (logits [B, V], Cache)` of the last token of prompts
        that are padded on the left, with slots for the prompt and `room` more tokens.
      step: `step(params, tokens [B], Cache) -> (logits [B, V], Cache)`.
    """

    prefill: Callable[[Params, Batch, int], tuple[Array, Cache]]
    step: Callable[[Params, Array, Cache], tuple[Array, Cache]]


class ModelFns(NamedTuple):
    """A model as pure functions.

    Attributes:
      config: the family's frozen dataclass; hashable, so a `ModelFns` may be a static argument.
      init: `init(key) -> params`, freshly drawn.
      apply: `apply(params, inputs, *, key=None) -> logits [B, num_labels]` (float32 or wider).
        `inputs` has Hugging Face's names. With a key it is training mode (dropout), with None it is
        deterministic. Any kernel may be an `Adapted`.
      precision: what products run in, one of `PRECISIONS`; parameters keep their own dtype.
      decoder: for models of text that go on one token at a time, or None.
    """

    config: Any
    init: Callable[[Array], Params]
    apply: Callable[..., Array]
    precision: str = "float32"
    decoder: Decoder | None = None


def caster(precision: str) -> Callable[[Array], Array]:
    """The cast of an array to the dtype that products run in; layers then keep to it.

    "float32" means float32 or, where parameters are wider, theirs.

    Raises:
      ValueError: a precision that is not one of `PRECISIONS`.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is not one of {', '.join(PRECISIONS)}")
    if precision == "bf16":
        return lambda x: x.astype(jnp.bfloat16)
    return tree.wide


Transform = Callable[[Any], Any]
"""One of our leaves in Hugging Face's layout. It must be a view: loading writes through it, so that a
tensor goes from the file to its place in a stack of layers without a copy in between."""


def KEEP(x):
    """The same layout."""
    return x


def TRANSPOSE(x):
    """A kernel is in x out here, out x in there."""
    return x.T


class Part(NamedTuple):
    """One NNX module as pure functions.

    Attributes:
      init: `init(key) -> params` of the part.
      bind: `bind(params)` gives the module with these values in its place, ready to be called.
    """

    init: Callable[[Array], Params]
    bind: Callable[[Params], Callable[..., Array]]


def part(make: Callable[..., nnx.Module]) -> Part:
    """Splits the module that `make(rngs=...)` builds into `init` and `bind`."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    return Part(
        init=lambda key: nnx.to_pure_dict(nnx.state(make(rngs=nnx.Rngs(key)))),
        bind=lambda params: nnx.merge(graphdef, params),
    )


def init_stack(layer: Part, key: Array, depth: int) -> Params:
    """Parameters of `depth` layers, stacked: every leaf is `[depth, ...]`."""
    return jax.vmap(layer.init)(jax.random.split(key, depth))


def unroll(depth: int, scan_layers: bool | None) -> int:
    """How many layers each turn of the scan over layers holds.

    Args:
      depth: the number of layers.
      scan_layers: True holds one, so that compile time does not grow with depth; False all of them;
        None up to twelve, since a scan copies what the backward pass needs: a third of RoBERTa-base's
        round on a GPU and a quarter of ViT-Tiny's on a CPU.
    """
    return {True: 1, False: depth, None: min(depth, 12)}[scan_layers]


def apply_stack(
    layer: Part,
    params: Params,
    x: Array,
    *,
    key: Array | None = None,
    unroll: int = 1,
    remat: bool = False,
) -> Array:
    """Runs stacked layers one after another with a scan; the depth is that of `params`.

    Args:
      layer: the definition of one layer, called as `module(x, key=key)`.
      params: as `init_stack` makes them; the scan slices every field of an `Adapted` as well.
      x: `[B, L, D]`.
      key: each layer gets its own, folded in by its number; None for all is deterministic.
      unroll: as `jax.lax.scan` takes it; the tree of parameters is the same whatever it is.
      remat: keep only each layer's input for the backward pass, and compute the layer again there.

    Returns:
      `[B, L, D]`.
    """

    def step(x, numbered):
        number, weights = numbered
        layer_key = None if key is None else jax.random.fold_in(key, number)
        return layer.bind(weights)(x, key=layer_key), None

    if remat:
        step = jax.checkpoint(step)
    depth = jax.tree.leaves(params)[0].shape[0]
    return jax.lax.scan(step, x, (jnp.arange(depth), params), unroll=unroll)[0]
