"""Our encoders compute what torch's do, layer by layer, whatever their kernels and keys are."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_vit import (
    BERT,
    CLIENTS,
    CONFIG,
    DEIT,
    KEY,
    ROBERTA,
    adapted,
    batch_of,
    close,
    factors,
    logits_of,
    model,
    pixels,
    to_torch,
    torch_model,
)

from fedgalore_jax import adapters, models
from fedgalore_jax.models import bert, functional, layers, roberta, vit
from fedgalore_jax.types import Adapted

IMAGES = [
    CONFIG,
    dataclasses.replace(CONFIG, hidden_act="gelu_new", num_channels=1),
    dataclasses.replace(CONFIG, qkv_bias=False),
    DEIT,
]
TEXTS = [BERT, ROBERTA]
TEXTS += [dataclasses.replace(config, labels=("score",), hidden_act="relu") for config in TEXTS]  # regression


def hidden_states(config, params, inputs):
    """What each layer gets and gives, from the parts that the model is made of."""
    if isinstance(config, vit.Config):
        embeddings, layer, given, rest = vit.Embeddings, vit.Layer, (inputs["pixel_values"],), ()
    else:
        ids = inputs["input_ids"]
        pad = config.pad_token_id
        where = roberta.positions(pad, ids) if config in TEXTS[1::2] else bert.positions(ids)
        embeddings, layer = bert.Embeddings, bert.Layer
        given, rest = (ids, inputs["token_type_ids"], where), (inputs["attention_mask"].astype(bool),)
    embeddings, layer = (functional.part(functools.partial(m, config)) for m in (embeddings, layer))
    yield (x := jax.jit(lambda params: embeddings.bind(params)(*given))(params["embeddings"]))
    step = jax.jit(lambda params, x: layer.bind(params)(x, *rest))
    for i in range(config.num_hidden_layers):
        yield (x := step(jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]), x))


@pytest.mark.parametrize("config", IMAGES + TEXTS, ids=lambda c: type(c).__module__.rsplit(".")[-1])
def test_every_layer_matches_torch(tmp_path, config):
    fns, params = model(config)
    models.save(tmp_path / "model", fns, params)
    inputs = batch_of(config)
    theirs = torch_model(tmp_path / "model")(**to_torch(inputs), output_hidden_states=True)
    for ours, state in zip(hidden_states(config, params, inputs), theirs.hidden_states, strict=True):
        close(ours, state)
    close(jax.jit(fns.apply)(params, inputs), theirs.logits)


@pytest.mark.parametrize("config", [CONFIG, BERT, ROBERTA], ids=["vit", "bert", "roberta"])
def test_all_gradients_match_torch(tmp_path, config):
    import torch

    fns, params = model(config)
    models.save(tmp_path / "model", fns, params)
    theirs, labels, inputs = torch_model(tmp_path / "model"), np.arange(4), batch_of(config)
    torch.nn.functional.cross_entropy(theirs(**to_torch(inputs)).logits, torch.tensor(labels)).backward()
    for weight in theirs.parameters():
        weight.data = weight.grad
    theirs.save_pretrained(tmp_path / "gradients")
    _, expected = models.load(tmp_path / "gradients")

    def loss(params):
        return -jax.nn.log_softmax(fns.apply(params, inputs))[labels, labels].mean()

    jax.tree.map(close, jax.jit(jax.grad(loss))(params), expected)


@pytest.mark.parametrize("parts", [2, 3])  # without and with a shrinking base
def test_adapted_kernels_equal_merged_ones(parts):
    fns, params = model()
    slots = adapted(params, {path: f[:parts] for path, f in factors(params).items()})
    merged = jax.tree.map(adapters.merge, slots, is_leaf=lambda leaf: isinstance(leaf, Adapted))
    close(logits_of(fns, slots), logits_of(fns, merged))
    assert jnp.abs(logits_of(fns, slots) - logits_of(fns, params)).max() > 0.1


def test_clients_see_their_own_adapters():
    fns, params = model()
    mine, images = factors(params, (CLIENTS,)), jnp.stack([pixels(c) for c in range(CLIENTS)])

    def client(factors, images):
        return fns.apply(adapted(params, factors), {"pixel_values": images})

    together = jax.jit(jax.vmap(client))(mine, images)
    for c in range(CLIENTS):
        slots = adapted(params, jax.tree.map(lambda leaf, c=c: leaf[c], mine))
        close(together[c], logits_of(fns, slots, images[c]))


def operands(jaxpr):
    """Shapes of all operands of products, in inner jaxprs too."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield from (v.aval.shape for v in eqn.invars)
        for inner in jax.core.jaxprs_in_params(eqn.params):
            yield from operands(inner)


@pytest.mark.parametrize("options", [{"scan_layers": True}, {"scan_layers": False}, {"remat": True}])
def test_base_stays_one_product_under_vmap(options, monkeypatch):
    """Where merging would move more bytes."""
    monkeypatch.setattr(adapters, "_merging_pays", lambda x, kernels: False)
    params, apply = model()[1], vit.build(CONFIG, **options).apply

    def loss(factors, params, images):
        return jnp.square(apply(adapted(params, factors), {"pixel_values": images})).mean()

    clients = jax.vmap(jax.grad(loss), in_axes=(0, None, 0))
    mine, images = factors(params, (CLIENTS,)), jnp.stack([pixels(c) for c in range(CLIENTS)])
    shapes = set(operands(jax.make_jaxpr(clients)(mine, params, images).jaxpr))
    for kernel in ((12, 12), (12, 20), (20, 12)):
        assert kernel in shapes
        assert (CLIENTS, *kernel) not in shapes


def test_double_precision_stays_double(x64):
    fns, params = model()
    wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
    images = jnp.asarray(pixels(), jnp.float64)
    assert "f32" not in str(jax.make_jaxpr(fns.apply)(wide, {"pixel_values": images}))


def test_images_of_another_size_are_refused():
    fns, params = model()
    with pytest.raises(ValueError, match=r"\(4, 8, 8, 3\) are not \[B, 6, 6, 3\]"):
        fns.apply(params, {"pixel_values": jnp.zeros((4, 8, 8, 3))})


RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob")


@pytest.mark.parametrize("rates", [RATES, RATES[:1], RATES[1:]])
def test_dropout_follows_the_key_and_each_rate_counts(rates):
    shallow = dataclasses.replace(CONFIG, num_hidden_layers=1)
    params = model(shallow)[1]
    fns = vit.build(dataclasses.replace(shallow, **dict.fromkeys(rates, 0.2)), scan_layers=True)
    dry = logits_of(model(shallow)[0], params)
    keys = jax.random.split(KEY, CLIENTS)[jnp.array([0, 0, 1, 2])]
    clients = jax.jit(jax.vmap(lambda key: fns.apply(params, {"pixel_values": pixels()}, key=key)))
    first, same, *others = clients(keys)
    np.testing.assert_array_equal(first, same)
    everyone = [dry, first, *others]
    for i, one in enumerate(everyone):
        assert all(jnp.abs(one - other).max() > 1e-3 for other in everyone[:i])


def test_without_a_key_dropout_is_off():
    fns, params = model(dataclasses.replace(CONFIG, **dict.fromkeys(RATES, 0.2)))
    close(logits_of(fns, params), logits_of(model()[0], params))


def test_every_layer_has_its_own_mask():
    class Binary(nnx.Module):
        """Appends one random digit to every number."""

        def __init__(self, *, rngs):
            self.zero = nnx.Param(jnp.zeros(()))

        def __call__(self, x, *, key):
            return 2 * x + layers.dropout(jnp.ones(x.shape), 0.5, key) / 2 + self.zero.get_value()

    layer = functional.part(Binary)
    numbers = functional.apply_stack(
        layer, functional.init_stack(layer, KEY, 4), jnp.zeros((1, 1, 64)), key=KEY
    )
    digits = np.asarray(numbers).astype(int).ravel()[:, None] >> np.arange(4) & 1
    assert len(np.unique(digits, axis=1).T) == 4


def test_dropout_keeps_the_mean():
    kept = layers.dropout(jnp.ones(20_000), 0.25, KEY)
    assert set(np.unique(kept).tolist()) == {0.0, np.float32(4 / 3).item()}
    assert abs(kept.mean() - 1) < 0.02


def test_unrolling_changes_no_number():
    params = model()[1]
    scanned, few, unrolled = (
        logits_of(vit.build(CONFIG, scan_layers=s), params) for s in (True, None, False)
    )
    close(scanned, few)
    close(scanned, unrolled)
