"""Padding, fused attention, precision and what the compiler is given: properties of all encoders."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_vit import BERT, CONFIG, KEY, ROBERTA, batch_of, close, model

from fedgalore_jax.models import bert, configs, layers, vit


@pytest.mark.parametrize("config", [BERT, ROBERTA], ids=["bert", "roberta"])
def test_padding_changes_no_logit(config):
    fns, params = model(config)
    inputs = batch_of(config)
    apply = jax.jit(fns.apply)
    expected = apply(params, inputs)
    other = jnp.where(inputs["attention_mask"] == 1, inputs["input_ids"], 4)
    if config is BERT:  # RoBERTa counts positions by what is not the padding token
        np.testing.assert_array_equal(apply(params, inputs | {"input_ids": other}), expected)
    longer = {
        name: jnp.pad(x, ((0, 0), (0, 4)), constant_values=config.pad_token_id if name == "input_ids" else 0)
        for name, x in inputs.items()
    }
    close(apply(params, longer), expected, atol=2e-6)
    for row, length in enumerate(inputs["attention_mask"].sum(-1)):
        alone = {name: x[row : row + 1, :length] for name, x in inputs.items()}
        del alone["attention_mask"]  # nothing is padded
        close(fns.apply(params, alone)[0], expected[row], atol=2e-6)


def test_a_row_of_padding_alone_gives_finite_gradients():
    fns, params = model(BERT)
    nothing = {name: jnp.zeros_like(x) for name, x in batch_of(BERT).items()}
    grads = jax.jit(jax.grad(lambda params: fns.apply(params, nothing).sum()))(params)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_too_long_a_text_is_refused():
    for config, longest in ((BERT, 16), (ROBERTA, 13)):
        fns, params = model(config)
        with pytest.raises(ValueError, match=rf"\(1, 17\) have more than {longest} tokens: truncate"):
            fns.apply(params, {"input_ids": jnp.ones((1, 17), jnp.int32)})


def test_the_fused_kernel_gets_what_it_takes(monkeypatch):
    """On a GPU, in half precision: the same numbers from cuDNN's kernel, here played by XLA's."""
    rng, calls, plain = np.random.default_rng(0), [], jax.nn.dot_product_attention
    q, k, v = (jnp.asarray(rng.normal(size=(2, 64, 3, 16)), jnp.bfloat16) for _ in range(3))
    mask = jnp.arange(64)[None] < jnp.array([[64], [5]])
    expected = layers.attend(q, k, v, mask=mask, key=None)

    def cudnn(q, k, v, *, mask, is_causal, implementation):
        assert implementation == "cudnn" and not is_causal and mask.shape == (2, 3, 64, 64)
        calls.append(mask)
        return plain(q, k, v, mask=mask)

    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    ours = layers.attend(q, k, v, mask=mask, key=None)
    close(np.asarray(ours, np.float32), np.asarray(expected, np.float32), atol=0.02)
    assert len(calls) == 1
    layers.attend(q, k, v, rate=0.1, key=KEY)  # dropout on probabilities
    layers.attend(*(x.astype(jnp.float32) for x in (q, k, v)), key=None)
    layers.attend(q[:, :63], k, v, key=None)
    assert len(calls) == 1


@pytest.mark.parametrize("config", [CONFIG, BERT], ids=["vit", "bert"])
def test_bf16_computes_in_bf16_and_reduces_in_float32(config):
    _, params = model(config)
    inputs = batch_of(config)
    fns = configs.family_of(config).build(config, precision="bf16", scan_layers=True)
    jaxpr = str(jax.make_jaxpr(fns.apply)(params, inputs))
    products = [line for line in jaxpr.splitlines() if "dot_general" in line]
    assert sum("bf16[" in line.split("=")[0] for line in products) >= 8
    logits = jax.jit(fns.apply)(params, inputs)
    assert logits.dtype == jnp.float32
    close(logits, jax.jit(model(config)[0].apply)(params, inputs), atol=0.2)
    grads = jax.eval_shape(jax.grad(lambda params: fns.apply(params, inputs).sum()), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    with pytest.raises(ValueError, match="precision='fp8' is not one of float32, bf16"):
        vit.build(CONFIG, precision="fp8")


def test_scanned_layers_compile_in_the_same_time_whatever_their_depth():
    def program(depth, **options):
        config = dataclasses.replace(BERT, num_hidden_layers=depth)
        fns = bert.build(config, **options)
        shapes = jax.eval_shape(fns.init, KEY)
        return len(
            str(jax.jit(jax.grad(lambda p: fns.apply(p, batch_of(BERT)).sum())).lower(shapes).as_text())
        )

    assert program(24, scan_layers=True) < 1.05 * program(6, scan_layers=True)
    assert program(8, scan_layers=False) > 1.3 * program(4, scan_layers=False)


def test_rematerialised_layers_keep_less_and_compute_the_same():
    config = dataclasses.replace(BERT, num_hidden_layers=8, intermediate_size=400)
    _, params = model(config)
    inputs, found = batch_of(config), []
    for remat in (False, True):
        fns = bert.build(config, scan_layers=True, remat=remat)
        step = jax.jit(jax.grad(lambda p, fns=fns: fns.apply(p, inputs).sum())).lower(params).compile()
        found.append((step(params), step.memory_analysis().temp_size_in_bytes))
    (kept, more), (again, less) = found
    jax.tree.map(lambda a, b: close(a, b, atol=1e-4), kept, again)
    assert less < 0.7 * more
