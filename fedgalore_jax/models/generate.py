"""Text from a decoder: one program that reads the prompts and then goes on token by token."""

import functools
from collections.abc import Sequence

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from fedgalore_jax.models.functional import ModelFns
from fedgalore_jax.types import Array, Batch, Params


def generate(
    fns: ModelFns,
    params: Params,
    inputs: Batch,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    key: Array | None = None,
    eos: Sequence[int] = (),
    pad: int = 0,
) -> Array:
    """Continues a batch of prompts, with the keys and values of earlier tokens kept.

    Compiled once per model, shape of the prompts, `max_new_tokens`, `eos` and `pad`. It ends as soon
    as all rows have ended.

    Args:
      fns: a model with a decoder.
      params: its parameters; kernels may be `Adapted`.
      inputs: `input_ids [B, L]`, and `attention_mask [B, L]` where prompts differ in length: they are
        padded on the left.
      max_new_tokens: n.
      temperature: 0 takes the most likely token, 1 samples as the model says.
      key: for a temperature above 0.
      eos: tokens that end a row; the row keeps that token and is `pad` from there on.
      pad: the token that fills up rows that ended.

    Returns:
      The new tokens `[B, n]`, int32.

    Raises:
      ValueError: the argument, its value, and the remedy.
    """
    if fns.decoder is None:
        raise ValueError(f"{type(fns.config).__module__} has no decoder: use a causal language model")
    if not inputs["input_ids"].size:
        raise ValueError(f"input_ids {inputs['input_ids'].shape} hold no token: give prompts of one at least")
    length, limit = inputs["input_ids"].shape[1], fns.config.max_position_embeddings
    if max_new_tokens < 1 or length + max_new_tokens > limit:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} after {length} tokens of prompt must be at least 1 and within "
            f"max_position_embeddings={limit}: ask for fewer or shorten the prompts"
        )
    if temperature < 0 or (temperature > 0 and key is None):
        raise ValueError(f"temperature={temperature} with key={key}: pass 0, or more and a key")
    vocabulary = fns.config.vocab_size
    if not all(0 <= token < vocabulary for token in (*eos, pad)):
        raise ValueError(f"eos={eos!r} and pad={pad} must be in [0, {vocabulary}), the model's vocabulary")
    mask = inputs.get("attention_mask")
    if mask is not None and not isinstance(mask, jax.core.Tracer) and not np.asarray(mask)[:, -1].all():
        raise ValueError("attention_mask is 0 at the end of a row: pad prompts on the left")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
    key = None if temperature == 0 else key
    return _generate(fns, params, inputs, temperature, key, max_new_tokens, tuple(eos), pad)


@functools.partial(jax.jit, static_argnames=("fns", "n", "eos", "pad"))
def _generate(
    fns: ModelFns,
    params: Params,
    inputs: Batch,
    temperature: Array | float,
    key: Array | None,
    n: int,
    eos: tuple[int, ...],
    pad: int,
) -> Array:
    assert fns.decoder is not None
    step = fns.decoder.step

    def pick(logits, i, done):
        if key is None:
            token = logits.argmax(-1)
        else:
            token = jax.random.categorical(jax.random.fold_in(key, i), logits / temperature)
        token = jnp.where(done, pad, token.astype(jnp.int32))
        return token, done | jnp.isin(token, jnp.array(eos, jnp.int32))

    def going(state):
        i, _, done, *_ = state
        return (i < n) & ~done.all()

    def turn(state):
        i, token, done, tokens, cache = state
        logits, cache = step(params, token, cache)
        token, done = pick(logits, i, done)
        return i + 1, token, done, tokens.at[:, i].set(token), cache

    logits, cache = fns.decoder.prefill(params, inputs, n)
    token, done = pick(logits, 0, jnp.zeros(len(logits), bool))
    tokens = jnp.full((len(logits), n), pad, jnp.int32).at[:, 0].set(token)
    return jax.lax.while_loop(going, turn, (jnp.int32(1), token, done, tokens, cache))[3]
