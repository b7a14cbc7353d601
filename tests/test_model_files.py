"""Directories of models: the same files both ways, and one clear message when they are not right."""

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from tiny_vit import (
    BERT,
    CONFIG,
    ROBERTA,
    SHIPPED,
    adapted,
    close,
    factors,
    logits_of,
    model,
    pixels,
    to_torch,
    torch_model,
)

from fedgalore_jax import models
from fedgalore_jax.data import digits
from fedgalore_jax.models import configs


def test_files_survive_the_round_trip(tmp_path):
    fns, params = model()
    models.save(tmp_path / "a", fns, params)
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    models.save(tmp_path / "a", fns, params)  # again, onto what is there
    loaded, again = models.load(tmp_path / "a")
    assert loaded.config == fns.config
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert {p.name for p in tmp_path.iterdir()} == {"a"}, "a temporary directory was left behind"
    assert len(list((tmp_path / "a").iterdir())) == 4

    theirs = torch_model(tmp_path / "a")
    assert theirs.config.id2label == dict(enumerate(CONFIG.labels))
    theirs.save_pretrained(tmp_path / "b")
    ours, back = (safetensors.numpy.load_file(tmp_path / d / "model.safetensors") for d in ("a", "b"))
    jax.tree.map(np.testing.assert_array_equal, ours, back)


def test_shipped_weights_agree_with_torch():
    fns, params = models.load(SHIPPED)
    assert sum(f.stat().st_size for f in SHIPPED.iterdir()) <= 1.5e6
    assert (fns.config.image_mean, fns.config.image_std) == ((0.5,), (0.5,))
    images = pixels(config=fns.config)
    close(logits_of(fns, params, images), torch_model(SHIPPED)(**to_torch({"pixel_values": images})).logits)


def test_shipped_weights_read_handwriting_they_never_saw():
    pytest.importorskip("sklearn")
    inputs, labels = digits.load().validation
    logits = logits_of(*models.load(SHIPPED), inputs["pixel_values"])
    assert (logits.argmax(-1) == labels).mean() > 0.8


def test_bfloat16_stays_bfloat16(tmp_path):
    fns, params = model()
    models.save(tmp_path / "model", fns, params)
    _, half = models.load(tmp_path / "model", dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}
    logits = logits_of(fns, half)
    assert logits.dtype == jnp.float32
    close(logits, logits_of(fns, params), atol=0.2)
    models.save(tmp_path / "half", fns, half)
    jax.tree.map(np.testing.assert_array_equal, models.load(tmp_path / "half")[1], half)


def test_a_new_head_is_drawn_and_reported(tmp_path, caplog):
    fns, params = model()
    models.save(tmp_path, fns, params)
    with caplog.at_level(logging.WARNING):
        same, kept = models.load(tmp_path, num_labels=5, dropout=0.1)
        assert not caplog.records
        _, drawn = models.load(tmp_path, num_labels=7, key=jax.random.key(3))
    assert "7 labels" in caplog.text
    assert same.config.attention_probs_dropout_prob == same.config.hidden_dropout_prob == 0.1
    jax.tree.map(np.testing.assert_array_equal, kept, params)
    assert drawn["classifier"]["kernel"].shape == (12, 7)
    assert not drawn["classifier"]["bias"].any()
    assert 0.2 < drawn["classifier"]["kernel"].std() < 0.4
    rest = [{k: v for k, v in p.items() if k != "classifier"} for p in (drawn, params)]
    jax.tree.map(np.testing.assert_array_equal, *rest)
    other = models.load(tmp_path, num_labels=7, key=jax.random.key(4))[1]["classifier"]
    assert (other["kernel"] != drawn["classifier"]["kernel"]).any()


def test_a_new_head_on_request(tmp_path):
    fns, params = model()
    models.save(tmp_path, fns, params)
    fresh, drawn = models.load(tmp_path, new_head=True)
    assert fresh.config == fns.config
    assert not drawn["classifier"]["bias"].any()
    assert (drawn["classifier"]["kernel"] != params["classifier"]["kernel"]).any()
    jax.tree.map(np.testing.assert_array_equal, drawn["layers"], params["layers"])


def test_a_bare_encoder_gets_a_head(tmp_path):
    fns, params = model()
    models.save(tmp_path, fns, params)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    bare = {k.removeprefix("vit."): v for k, v in tensors.items() if not k.startswith("class")}
    safetensors.numpy.save_file(bare | {"pooler.dense.bias": np.zeros(12)}, file)
    _, loaded = models.load(tmp_path, num_labels=2)
    assert loaded["classifier"]["bias"].shape == (2,)
    with pytest.raises(ValueError, match=r"missing: classifier\.bias, classifier\.weight:"):
        models.load(tmp_path)


def test_a_masked_language_model_gets_a_pooler_and_a_head(tmp_path, caplog):
    transformers = pytest.importorskip("transformers")
    _, params = model(BERT)
    models.save(tmp_path / "a", *model(BERT))
    transformers.BertForMaskedLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    drawn = models.load(tmp_path / "b", num_labels=2)[1]
    assert "has no pooler: a new one is drawn" in caplog.text
    assert drawn["pooler"]["kernel"].shape == (12, 12) and drawn["classifier"]["kernel"].shape == (12, 2)
    assert 0.2 < drawn["pooler"]["kernel"].std() < 0.4 and not drawn["pooler"]["bias"].any()
    jax.tree.map(np.testing.assert_array_equal, drawn["layers"], params["layers"])
    caplog.clear()
    kept = models.load(tmp_path / "a", new_head=True)[1]
    np.testing.assert_array_equal(kept["pooler"]["kernel"], params["pooler"]["kernel"])
    assert not caplog.records
    with pytest.raises(ValueError, match=r"missing: bert\.pooler.*num_labels where only the head"):
        models.load(tmp_path / "b")


def test_every_mismatch_is_in_one_message(tmp_path):
    fns, params = model()
    models.save(tmp_path, fns, params)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    del tensors["vit.encoder.layer.2.output.dense.bias"], tensors["vit.layernorm.weight"]
    tensors["vit.extra"] = np.zeros(1)
    tensors["vit.encoder.layer.0.intermediate.dense.weight"] = np.zeros((20, 13))
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(ValueError) as error:
        models.load(tmp_path)
    message = str(error.value)
    assert "\n" not in message
    for part in (
        "model.safetensors",
        "missing: vit.encoder.layer.2.output.dense.bias, vit.layernorm.weight",
        "unexpected: vit.extra",
        "wrong shape: vit.encoder.layer.0.intermediate.dense.weight (20, 13) instead of (20, 12)",
        "num_labels",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("model.safetensors", lambda b: b[:-9], r"model\.safetensors is damaged .* copy it again"),
        ("model.safetensors", lambda b: b[:4], r"model\.safetensors is damaged .* copy it again"),
        ("model.safetensors", None, "does not exist: save the model as safetensors"),
        ("config.json", lambda b: b[:40], r"config\.json is damaged .* copy it again"),
        ("config.json", lambda b: b"[]", r"config\.json holds no JSON object"),
        ("config.json", None, "does not exist: name a Hugging Face directory"),
        (
            "config.json",
            {"model_type": "gpt9"},
            "model_type='gpt9' is not supported: use one of bert, deit, llama",
        ),
        ("config.json", {"hidden_size": None}, "hidden_size=None is not of type int"),
        ("config.json", {"hidden_size": 13}, "must be a multiple of num_attention_heads"),
        ("config.json", {"hidden_act": "gele"}, "hidden_act='gele': use one of gelu"),
        ("config.json", {"id2label": [1]}, r"config\.json: "),
        ("preprocessor_config.json", lambda b: b"{", r"preprocessor_config\.json is damaged"),
        ("preprocessor_config.json", {"rescale_factor": 0}, r"config\.json: float division by zero"),
    ],
)
def test_damage_is_one_line_with_a_remedy(tmp_path, file, damage, words):
    models.save(tmp_path, *model())
    path = tmp_path / file
    if damage is None:
        path.unlink()
    elif isinstance(damage, dict):
        path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    else:
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=words) as error:
        models.load(tmp_path)
    assert "\n" not in str(error.value)


def test_without_a_processor_all_channels_are_normalised_alike(tmp_path):
    grey = dataclasses.replace(CONFIG, num_channels=1, image_mean=(0.5,), image_std=(0.5,))
    models.save(tmp_path, *model(grey))
    (tmp_path / "preprocessor_config.json").unlink()
    assert models.load(tmp_path)[0].config == grey


@pytest.mark.parametrize("config", [BERT, ROBERTA], ids=["bert", "roberta"])
def test_a_decoder_among_encoders_is_refused(tmp_path, config):
    models.save(tmp_path, *model(config))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"is_decoder": True}))
    with pytest.raises(ValueError, match="is_decoder=True masks what comes later"):
        models.load(tmp_path)


def test_missing_config_keys_are_all_named(tmp_path):
    models.save(tmp_path, *model())
    content = json.loads((tmp_path / "config.json").read_text())
    del content["hidden_size"], content["patch_size"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="hidden_size is missing, patch_size is missing"):
        models.load(tmp_path)


@pytest.mark.parametrize("option", [{"num_labels": 0}, {"dropout": 1.5}])
def test_bad_options_are_refused(tmp_path, option):
    models.save(tmp_path, *model())
    (name,) = option
    with pytest.raises(ValueError, match=name):
        models.load(tmp_path, **option)


def test_save_refuses_what_is_not_the_model(tmp_path):
    fns, params = model()
    with pytest.raises(ValueError, match="layers/intermediate/kernel"):
        models.save(tmp_path / "model", fns, adapted(params, factors(params)))
    with pytest.raises(ValueError, match="classifier/kernel"):
        models.save(tmp_path / "model", fns, {**params, "classifier": {}})
    assert not list(tmp_path.iterdir())


def test_null_in_a_config_means_not_given(tmp_path):
    """`transformers` writes `"classifier_dropout": null` for every BERT."""
    transformers = pytest.importorskip("transformers")
    transformers.BertConfig(num_labels=2).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["classifier_dropout"] is None
    _, config = configs.read(tmp_path, None, None)
    assert config.head_dropout == config.hidden_dropout_prob == 0.1


def test_weights_may_be_read_by_whom_the_config_may(tmp_path):
    models.save(tmp_path / "tiny", *model())
    modes = {file.stat().st_mode for file in (tmp_path / "tiny").iterdir()}
    assert len(modes) == 1
