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


@pytest.fixture
def cudnn(monkeypatch):
    """A GPU's fused kernel played by XLA's, as strict about lengths; gives the calls."""
    calls, plain = [], jax.nn.dot_product_attention

    def kernel(q, k, v, *, implementation, mask=None, **rest):
        assert implementation == "cudnn" and q.shape[1] % 2 == k.shape[1] % 2 == 0
        assert mask is None or mask.shape == (len(q), q.shape[2], q.shape[1], k.shape[1])
        calls.append(rest)
        return plain(q, k, v, mask=mask, **rest)

    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    return calls


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("length", [64, 65])
def test_the_fused_kernel_gives_the_same_numbers(cudnn, length, masked):
    """Clients' rows under vmap, with gradients; an odd length is padded for the kernel."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 2, length, 3, 16)), jnp.bfloat16) for _ in range(3))
    mask = jnp.asarray(np.arange(length) < np.array([[[64], [5]], [[9], [33]]])) if masked else None

    def numbers(rate):
        def one(q, k, v, mask):
            return layers.attend(q, k, v, mask=mask, rate=rate, key=KEY if rate else None)

        def total(q, k, v, mask):
            return jnp.square(one(q, k, v, mask).astype(jnp.float32)).sum()

        axes = (0, 0, 0, 0 if masked else None)
        both = jax.jit(jax.vmap(lambda *x: (one(*x), jax.grad(total, (0, 1, 2))(*x)), axes))
        return jax.tree.leaves(both(q, k, v, mask))

    fused = numbers(0)
    assert cudnn
    calls = len(cudnn)
    plain = numbers(1e-9)  # asks for dropout, which the kernel does not do, and rounds to none
    assert len(cudnn) == calls
    for ours, theirs in zip(fused, plain, strict=True):
        scale = float(jnp.abs(theirs).max())
        close(np.asarray(ours, np.float32) / scale, np.asarray(theirs, np.float32) / scale, atol=0.02)


def test_the_fused_kernel_is_for_half_precision_and_length(cudnn):
    q = jnp.ones((1, 64, 2, 16), jnp.bfloat16)
    layers.attend(q, q, q, rate=0.1, key=KEY)
    layers.attend(*[q.astype(jnp.float32)] * 3)
    layers.attend(q[:, :63], q, q)
    assert not cudnn
    layers.attend(q, q, q)
    assert len(cudnn) == 1


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
