"""Our decoders compute what torch's do, wherever the padding is; files survive the round trip."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from tiny_llama import (
    CONFIGS,
    KEY,
    LLAMA,
    MISTRAL,
    QWEN2,
    TIED,
    forward,
    model,
    prompts,
    to_torch,
    torch_model,
)
from tiny_vit import adapted, close, factors

from fedgalore_jax import adapters, models
from fedgalore_jax.models import functional, llama
from fedgalore_jax.types import Adapted

every_family = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@every_family
def test_every_layer_and_all_gradients_match_torch(tmp_path, config):
    import torch

    fns, params = model(config)
    models.save(tmp_path / "model", fns, params)
    inputs = prompts("right")
    twin = torch_model(tmp_path / "model")
    theirs = twin(**to_torch(inputs), output_hidden_states=True)
    mask = np.asarray(inputs["attention_mask"], bool)

    layer = functional.part(functools.partial(llama.Layer, config))
    angles = np.arange(mask.shape[1])[None, :, None] * config.rope.frequencies(config.head_dim)
    angles = jnp.asarray(np.broadcast_to(angles, (*mask.shape, angles.shape[-1])), jnp.float32)
    step = jax.jit(lambda params, x: layer.bind(params)(x, angles, jnp.asarray(mask)))
    x = params["embeddings"]["embed_tokens"][inputs["input_ids"]]
    for i in range(config.num_hidden_layers - 1):  # torch gives the last one after the norm
        x = step(jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]), x)
        close(x[mask], theirs.hidden_states[i + 1][mask], atol=1e-4)
    logits = forward(fns)(params, inputs)
    assert logits.dtype == jnp.float32
    close(logits[mask], theirs.logits[mask], atol=1e-4)

    targets = np.random.default_rng(5).integers(0, config.vocab_size, mask.sum())
    torch.nn.functional.cross_entropy(theirs.logits[mask], torch.tensor(targets)).backward()
    for weight in twin.parameters():
        weight.data = weight.grad
    twin.save_pretrained(tmp_path / "gradients")
    _, expected = models.load(tmp_path / "gradients")

    def loss(params):
        logits = fns.apply(params, inputs)[mask]
        return -jax.nn.log_softmax(logits)[np.arange(len(targets)), targets].mean()

    jax.tree.map(functools.partial(close, atol=1e-4), jax.jit(jax.grad(loss))(params), expected)


@every_family
def test_files_survive_the_round_trip(tmp_path, config):
    fns, params = model(config)
    models.save(tmp_path / "a", fns, params)
    loaded, again = models.load(tmp_path / "a")
    assert loaded.config == config
    jax.tree.map(np.testing.assert_array_equal, again, params)
    torch_model(tmp_path / "a").save_pretrained(tmp_path / "b")  # with a generation_config.json
    ours, back = (safetensors.numpy.load_file(tmp_path / d / "model.safetensors") for d in ("a", "b"))
    jax.tree.map(np.testing.assert_array_equal, ours, back)
    assert models.load(tmp_path / "b")[0].config == config
    assert ("lm_head" in params) != config.tie_word_embeddings


def test_padding_changes_no_logit():
    fns, params = model()
    left, right = prompts("left"), prompts("right")
    sides = [forward(fns)(params, x)[np.asarray(x["attention_mask"], bool)] for x in (left, right)]
    close(*sides)
    start = 0
    for tokens, mask in zip(right["input_ids"], right["attention_mask"], strict=True):
        n = int(mask.sum())
        if n in (1, 9):  # each length compiles once
            close(forward(fns)(params, {"input_ids": tokens[None, :n]})[0], sides[0][start : start + n])
        start += n


def test_a_token_sees_no_later_one():
    fns, params = model(QWEN2)
    inputs = prompts()
    changed = inputs | {"input_ids": inputs["input_ids"].at[:, 6:].set(3)}
    one, other = (forward(fns)(params, x) for x in (inputs, changed))
    earlier = np.asarray(inputs["attention_mask"], bool) & (np.arange(9) < 6)[None]
    np.testing.assert_array_equal(one[earlier], other[earlier])
    assert jnp.abs(one - other)[:, 6:].max() > 0.1


def test_adapted_kernels_equal_merged_ones():
    fns, params = model()
    slots = adapted(params, factors(params))
    rng, head = np.random.default_rng(4), params["lm_head"]["kernel"]
    a, b = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((head.shape[0], 2), (2, head.shape[1])))
    slots["lm_head"] = {"kernel": Adapted(head, a, b)}
    merged = jax.tree.map(adapters.merge, slots, is_leaf=lambda leaf: isinstance(leaf, Adapted))
    close(forward(fns)(slots, prompts()), forward(fns)(merged, prompts()), atol=1e-4)


@pytest.mark.parametrize("options", [{"scan_layers": False}, {"remat": True}, {}])
def test_how_layers_run_changes_no_gradient(options):
    _, params = model(TIED)

    def loss(fns):
        return jax.jit(jax.grad(lambda params: jnp.square(fns.apply(params, prompts())).mean()))

    expected = loss(model(TIED)[0])(params)
    jax.tree.map(close, loss(llama.build(TIED, **options))(params), expected)


@pytest.mark.parametrize("config", [LLAMA, TIED], ids=["untied", "tied"])
def test_bf16_computes_in_bf16(config):
    fns, params = model(config)
    half = llama.build(config, precision="bf16")
    text = str(jax.make_jaxpr(half.apply)(params, prompts()))
    assert "bf16" in text
    logits = jax.jit(half.apply)(params, prompts())
    assert logits.dtype == jnp.float32
    assert (logits != logits.astype(jnp.bfloat16)).mean() > 0.9, "the logits were rounded"
    close(logits, forward(fns)(params, prompts()), atol=0.1)


def test_double_precision_stays_double(x64):
    fns, params = model()
    wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
    assert "f32" not in str(jax.make_jaxpr(fns.apply)(wide, prompts()))


def test_dropout_follows_the_key():
    fns, params = model(dataclasses.replace(LLAMA, attention_dropout=0.2))
    run = jax.jit(lambda key: fns.apply(params, prompts(), key=key))
    first, same, other = (run(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert jnp.abs(first - other).max() > 1e-3
    close(forward(fns)(params, prompts()), forward(model()[0])(params, prompts()))


def test_a_decoder_needs_no_labels_and_draws_no_head(tmp_path):
    fns, params = model()
    models.save(tmp_path, fns, params)
    assert not {"labels", "id2label"} & json.loads((tmp_path / "config.json").read_text()).keys()
    same, kept = models.load(tmp_path, num_labels=7, dropout=0.1)
    assert same.config == dataclasses.replace(fns.config, attention_dropout=0.1)
    jax.tree.map(np.testing.assert_array_equal, kept, params)


def test_a_tied_head_may_be_in_the_file_twice(tmp_path):
    fns, params = model(TIED)
    models.save(tmp_path, fns, params)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    copy = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    safetensors.numpy.save_file(tensors | copy, file)
    jax.tree.map(np.testing.assert_array_equal, models.load(tmp_path)[1], params)


def test_a_head_of_its_own_is_not_tied(tmp_path):
    """transformers keeps it, and says to correct the configuration."""
    fns, params = model(TIED)
    models.save(tmp_path, fns, params)
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors = safetensors.numpy.load_file(file)
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"] + np.eye(61, 16, dtype=np.float32)}
    safetensors.numpy.save_file(tensors | head, file)
    with pytest.raises(ValueError, match=r"lm_head\.weight is not .* set tie_word_embeddings to false"):
        models.load(tmp_path)
    config.write_text(
        config.read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false')
    )
    fns, params = models.load(tmp_path)
    mask = np.asarray(prompts()["attention_mask"], bool)
    theirs = torch_model(tmp_path)(**to_torch(prompts())).logits
    close(forward(fns)(params, prompts())[mask], theirs[mask], atol=1e-4)


OLD = {"rope_parameters": None, "rope_theta": 500000, "head_dim": None}


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        (OLD | {"rope_scaling": {"type": "linear", "factor": 2}}, "rope", llama.Rope("linear", 5e5, 2.0)),
        (OLD, "rope", llama.Rope("default", 5e5)),
        (OLD, "head_dim", 4),
        ({"num_key_value_heads": None}, "num_key_value_heads", 4),
        (
            {"original_max_position_embeddings": 32},
            "rope",
            LLAMA.rope._replace(original_max_position_embeddings=32),
        ),
        ({"eos_token_id": 3}, "eos_token_id", (3,)),
        ({"eos_token_id": [3, 4]}, "eos_token_id", (3, 4)),
    ],
)
def test_configurations_of_every_age_are_read(changes, field, value):
    raw = llama.files(LLAMA)["config.json"] | changes
    assert llama.fields(raw)[field] == value


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        (MISTRAL, {"sliding_window": 64}, "sliding_window=64 .* max_position_embeddings=128 to at most 64"),
        (
            dataclasses.replace(MISTRAL, max_position_embeddings=8192),
            {"sliding_window": "absent"},
            "sliding_window=4096 is not supported",
        ),
        (QWEN2, {"sliding_window": 64, "use_sliding_window": True}, "sliding_window=64 is not supported"),
        (LLAMA, {"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn' .* default, linear, llama3"),
        (LLAMA, {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters: factor is missing"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA, {"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads"),
        (LLAMA, {"vocab_size": 0}, "vocab_size=0 must be at least 1"),
        (LLAMA, {"num_attention_heads": 0, "head_dim": None}, "num_attention_heads=0 must be at least 1"),
        (LLAMA, {"hidden_act": "gele"}, "hidden_act='gele': use one of"),
    ],
)
def test_what_is_not_supported_is_one_line(tmp_path, config, changes, words):
    models.save(tmp_path, *model(config))
    file = tmp_path / "config.json"
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in content.items() if value != "absent"}))
    with pytest.raises(ValueError, match=words) as error:
        models.load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (MISTRAL, {"attention_bias": True, "mlp_bias": True}),
        (QWEN2, {"attention_bias": True, "mlp_bias": True}),
        (TIED, {"original_max_position_embeddings": 32}),
    ],
    ids=["mistral", "qwen2", "llama"],
)
def test_what_transformers_overrules_we_do_too(tmp_path, config, changes):
    models.save(tmp_path, *model(config))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    fns, params = models.load(tmp_path)
    mask = np.asarray(prompts()["attention_mask"], bool)
    theirs = torch_model(tmp_path)(**to_torch(prompts())).logits
    close(forward(fns)(params, prompts())[mask], theirs[mask], atol=1e-4)


def test_a_window_that_never_ends_is_fine(tmp_path):
    raw = llama.files(MISTRAL)["config.json"]
    assert llama.fields(raw | {"sliding_window": 128})
    assert llama.fields(llama.files(QWEN2)["config.json"] | {"sliding_window": 64})


def test_init_is_what_its_configuration_says():
    drawn = llama.build(TIED).init(KEY)
    assert jax.tree.structure(drawn) == jax.tree.structure(model(TIED)[1])
    assert 0.015 < drawn["layers"]["mlp"]["up"]["kernel"].std() < 0.025
