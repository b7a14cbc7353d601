"""Generation with a cache says what torch's `generate` says, and what plain forward passes say."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_llama
import tiny_vit
from tiny_llama import KEY, LLAMA, QWEN2, prompts, to_torch, torch_model
from tiny_vit import adapted, factors

from fedgalore_jax import adapters, models
from fedgalore_jax.types import Adapted


def model(config=LLAMA):
    """With weights so large that it neither repeats itself nor thinks all tokens alike."""
    fns, params = tiny_llama.model(config)
    return fns, jax.tree.map(lambda leaf: 3 * leaf, params)


@pytest.mark.parametrize("config", [LLAMA, QWEN2], ids=["llama3", "qwen2"])
def test_greedy_tokens_are_torchs(tmp_path, config):
    fns, params = model(config)
    models.save(tmp_path, fns, params)
    inputs, twin = prompts(), torch_model(tmp_path)
    tensors = to_torch(inputs)
    del tensors["position_ids"]  # generate makes its own
    free = twin.generate(**tensors, max_new_tokens=32, do_sample=False, pad_token_id=0)[:, 9:]
    ours = models.generate(fns, params, inputs, max_new_tokens=32)
    np.testing.assert_array_equal(ours, free)
    assert len(np.unique(ours)) > 8, "too dull to tell"

    eos = [int(free[0, 3]), int(free[3, 5])]
    theirs = twin.generate(**tensors, max_new_tokens=32, do_sample=False, pad_token_id=7, eos_token_id=eos)
    theirs = np.asarray(theirs[:, 9:])
    ended = models.generate(fns, params, inputs, max_new_tokens=32, eos=eos, pad=7)
    np.testing.assert_array_equal(ended[:, : theirs.shape[1]], theirs)
    assert (ended[:, theirs.shape[1] :] == 7).all()
    assert (ended[0] == 7).sum() >= 28


def test_the_prompt_may_come_without_a_mask():
    fns, params = model()
    tokens = prompts()["input_ids"]
    full = {"input_ids": tokens, "attention_mask": jnp.ones_like(tokens)}
    bare, masked = (models.generate(fns, params, x, max_new_tokens=5) for x in ({"input_ids": tokens}, full))
    np.testing.assert_array_equal(bare, masked)


def test_the_program_is_compiled_once_per_shape():
    program = importlib.import_module("fedgalore_jax.models.generate")._generate
    fns, params = model(QWEN2)
    program.clear_cache()
    for seed in (1, 2):
        models.generate(fns, params, prompts(seed=seed), max_new_tokens=3)
    assert program._cache_size() == 1
    for seed in (0.5, 2.0):
        models.generate(fns, params, prompts(), max_new_tokens=3, temperature=seed, key=KEY)
    assert program._cache_size() == 2


def test_sampling_follows_the_models_distribution_and_the_key():
    fns, params = model()
    one = {"input_ids": jnp.array([[5, 9, 2]])}
    many = {"input_ids": jnp.tile(one["input_ids"], (4000, 1))}
    tokens = models.generate(fns, params, many, max_new_tokens=1, temperature=2.0, key=KEY)
    frequencies = np.bincount(tokens[:, 0], minlength=LLAMA.vocab_size) / 4000
    expected = jax.nn.softmax(fns.apply(params, one)[0, -1] / 2.0)
    assert np.abs(frequencies - expected).max() < 0.03
    assert np.abs(frequencies - 1 / LLAMA.vocab_size).max() > 0.1, "a uniform draw would pass"

    def draw(seed, temperature=1.0):
        key = jax.random.key(seed)
        return models.generate(fns, params, prompts(), max_new_tokens=9, temperature=temperature, key=key)

    np.testing.assert_array_equal(draw(0), draw(0))
    assert (draw(0) != draw(1)).any()
    np.testing.assert_array_equal(draw(0, 1e-4), models.generate(fns, params, prompts(), max_new_tokens=9))


def test_adapted_models_generate_as_merged_ones():
    fns, params = model()
    slots = adapted(params, factors(params))
    merged = jax.tree.map(adapters.merge, slots, is_leaf=lambda leaf: isinstance(leaf, Adapted))
    ours, theirs, base = (
        models.generate(fns, p, prompts(), max_new_tokens=9) for p in (slots, merged, params)
    )
    np.testing.assert_array_equal(ours, theirs)
    assert (ours != base).any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 after 9"),
        ({"max_new_tokens": 120}, "within max_position_embeddings=128"),
        ({"temperature": 0.5}, r"temperature=0\.5 with key=None"),
        ({"temperature": -1.0}, r"temperature=-1\.0"),
        ({"eos": (61,)}, r"eos=\(61,\) and pad=0 must be in \[0, 61\)"),
        ({"pad": -1}, "pad=-1"),
    ],
)
def test_bad_arguments_are_one_line(options, words):
    with pytest.raises(ValueError, match=words):
        models.generate(*model(), prompts(), **{"max_new_tokens": 3} | options)


@pytest.mark.parametrize("shape", [(0, 3), (1, 0)])
def test_no_prompt_is_one_line(shape):
    with pytest.raises(ValueError, match=r"input_ids \(.*\) hold no token"):
        models.generate(*model(), {"input_ids": jnp.ones(shape, jnp.int32)}, max_new_tokens=2)


def test_other_models_and_other_padding_are_refused():
    with pytest.raises(ValueError, match="pad prompts on the left"):
        models.generate(*model(), prompts("right"), max_new_tokens=3)
    with pytest.raises(ValueError, match=r"models\.vit has no decoder"):
        models.generate(*tiny_vit.model(), prompts(), max_new_tokens=3)


def test_every_token_is_drawn_anew():
    """At a temperature of near infinity all tokens are alike, and each is drawn anew."""
    fns, params = model()
    tokens = models.generate(fns, params, prompts(), max_new_tokens=9, temperature=1e9, key=KEY)
    assert all(len(set(row)) > 3 for row in np.asarray(tokens).tolist())


def test_all_positions_can_be_filled():
    fns, params = model()
    assert models.generate(fns, params, prompts(), max_new_tokens=119).shape[1] == 119
    with pytest.raises(ValueError, match="max_new_tokens=120 after 9"):
        models.generate(fns, params, prompts(), max_new_tokens=120)


def test_it_ends_once_all_have_ended():
    fns, params = model()
    one = {"input_ids": jnp.array([[5, 9, 2]])}
    eos = [int(models.generate(fns, params, one, max_new_tokens=1)[0, 0])]
    seen, step = [], fns.decoder.step

    def counted(params, token, cache):
        jax.debug.callback(lambda: seen.append(1))
        return step(params, token, cache)

    fns = fns._replace(decoder=fns.decoder._replace(step=counted))
    models.generate(fns, params, one, max_new_tokens=9, eos=eos).block_until_ready()
    jax.effects_barrier()
    assert not seen
