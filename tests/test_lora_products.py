"""Federated LoRA methods that average products against float64 NumPy; and what servers hold and send."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import (
    DECAY,
    LR,
    OPTIONS,
    R,
    S,
    T,
    assert_model,
    every_client,
    factors,
    mean_of,
    run,
    start,
    trained,
)
from problem import K, L, N, absent, away, m, n, params, plan, setup

from fedgalore_jax.client import local_train
from fedgalore_jax.optimizer import adam_state
from fedgalore_jax.strategies import build
from fedgalore_jax.strategies.base import Cohort, Ops, Upload
from fedgalore_jax.types import LoRA

pytestmark = pytest.mark.usefixtures("x64")


def test_fedex_lora_aggregates_exactly():
    w, bias, _ = start()
    _, _, state = setup("fedex_lora", **OPTIONS)
    (a, b), base = factors(state), start()[0]
    for t in range(3):
        now = {"a": a, "b": b, "bias": bias}
        rows = every_client(t, lambda _, x, now=now, base=base: trained(base, now, x))
        exact = base + S * sum(p * values["a"] @ values["b"] for p, values in rows)
        a, b, bias = (mean_of(rows, k) for k in ("a", "b", "bias"))
        base = exact - S * a @ b
    got = run("fedex_lora", 3)
    assert_model(got, exact, bias)
    np.testing.assert_allclose(got[2].server.frozen["layers/kernel"], base, atol=1e-9)
    assert np.abs(base - w).max() > 1e-3


def test_flora_merges_the_stack_of_different_ranks():
    """Each client's own scale alpha / r_i; its draw is the library's."""
    ranks, alpha = (3, 1), 4.0
    base, bias, _ = start()
    machine, _, state = setup("flora", ranks=ranks, lora_alpha=alpha, **OPTIONS)
    strategy = machine.strategy
    for t in range(2):
        download = strategy.broadcast(state.server)._replace(round=jnp.int32(t))

        def train(c, batches, download=download, base=base, bias=bias, t=t):
            key = jax.random.fold_in(jax.random.fold_in(state.key, t), c)
            ops = Ops(jnp.int32(c), jnp.ones(()), jax.random.fold_in(key, 1), None, None, K)
            drawn = strategy.start(download, (), ops).trainable["layers/kernel"]
            rank = ranks[c % 2]
            assert not np.asarray(drawn.a)[..., rank:].any() and np.asarray(drawn.a)[..., :rank].all()
            a, b = np.asarray(drawn.a)[..., :rank], np.asarray(drawn.b)[..., :rank, :]
            return trained(base, {"a": a, "b": b, "bias": bias}, batches, s=alpha / rank)

        rows = every_client(t, train)
        base = base + sum(p * alpha / ranks[c % 2] * v["a"] @ v["b"] for c, (p, v) in enumerate(rows))
        bias = mean_of(rows, "bias")
    assert_model(run("flora", 2, ranks=ranks, lora_alpha=alpha), base, bias)


def test_flexlora_deals_out_the_best_factors_of_each_rank():
    ranks, alpha = (3, 1), 4.0
    w, bias, _ = start()
    _, _, state = setup("flexlora", ranks=ranks, lora_alpha=alpha, **OPTIONS)
    a, product = factors(state)[0], np.zeros_like(w)
    b = np.zeros((*a.shape[:-2], R, w.shape[-1]))
    for t in range(2):

        def train(c, batches, a=a, b=b, bias=bias):
            rank = ranks[c % 2]
            now = {"a": a[..., :rank], "b": b[..., :rank, :] * rank / alpha, "bias": bias}
            return trained(w, now, batches, s=alpha / rank)

        rows = every_client(t, train)
        product = sum(p * alpha / ranks[c % 2] * v["a"] @ v["b"] for c, (p, v) in enumerate(rows))
        u, s, vt = np.linalg.svd(product, full_matrices=False)
        peak = np.take_along_axis(u, np.abs(u).argmax(-2, keepdims=True), -2)
        sign = np.sign(peak)
        a, b = (u * sign)[..., :R], (T(sign) * s[..., None] * vt)[..., :R, :]
        bias = mean_of(rows, "bias")
    assert_model(run("flexlora", 2, ranks=ranks, lora_alpha=alpha), w + a @ b, bias)


def test_fr_lora_starts_from_principal_components_and_folds():
    base, bias, _ = start()
    u, s, vt = np.linalg.svd(base, full_matrices=False)
    peak = np.take_along_axis(u, np.abs(u).argmax(-2, keepdims=True), -2)
    u, vt = u * np.sign(peak), T(np.sign(peak)) * vt
    root = np.sqrt(s[..., :R] / S)
    a, b = u[..., :R] * root[..., None, :], root[..., None] * vt[..., :R, :]
    base = base - S * a @ b
    got_a, got_b = factors(setup("fr_lora", **OPTIONS)[2])
    np.testing.assert_allclose(S * got_a @ got_b, S * a @ b, atol=1e-9)
    np.testing.assert_allclose(got_a, a, atol=1e-7)
    for t in range(3):
        now = {"a": got_a, "b": got_b, "bias": bias}
        rows = every_client(t, lambda _, x, now=now, base=base: trained(base, now, x))
        base = base + S * (mean_of(rows, "a") @ mean_of(rows, "b") - got_a @ got_b)
        bias = mean_of(rows, "bias")
    assert_model(run("fr_lora", 3), base + S * got_a @ got_b, bias)


@pytest.mark.parametrize("method", ["flexlora", "flora", "fedex_lora"])
def test_the_servers_memory(method):
    """FlexLoRA never forms m x n; FLoRA and FedEx-LoRA, whose base changes, never C of them."""
    width, r = 512, 4
    shapes = {"layers": {"kernel": (1, width, width)}, "classifier": {"bias": (3,)}}
    model = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )
    strategy = build(method, lr=1.0, rank=r)
    state = jax.eval_shape(lambda p: strategy.init(p, jax.random.key(0), 8), model)
    temporary = {}
    for clients in (4, 8):
        rows = LoRA(*(jax.ShapeDtypeStruct((clients, 1, *s), jnp.float32) for s in ((width, r), (r, width))))
        change = {"classifier/bias": jax.ShapeDtypeStruct((3,), jnp.float32)}
        if method == "fedex_lora":
            change["layers/kernel"] = LoRA(*(jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in rows))
        upload = Upload({"change": change}, (), {"layers/kernel": rows})

        def aggregate(state, upload, weights):
            return strategy.aggregate(state, upload, Cohort(weights, weights, 8, 1))

        weights = jax.ShapeDtypeStruct((clients,), jnp.float32)
        compiled = jax.jit(aggregate).lower(state, upload, weights).compile()
        temporary[clients] = compiled.memory_analysis().temp_size_in_bytes
    dense, stack = 4 * width**2, 4 * r * 2 * width
    if method == "flexlora":
        assert temporary[8] < dense and temporary[8] < 8 * 8 * stack
    else:
        assert temporary[8] < 2 * dense + 4 * 8 * stack
    assert temporary[8] - temporary[4] < 4 * 8 * stack  # grows with the stack, not with C kernels


@pytest.mark.parametrize("method", ["flora", "fedex_lora", "fr_lora"])
def test_catching_up_is_counted(method):
    """A client that missed rounds in which the base changed is sent those rounds' factors first."""
    machine, rounds, state = setup(method, dtype=np.float64)
    every = plan(range(3))
    _, metrics = rounds(state, machine.train, away(every, 2, 0, 1), 3)
    pair = 8 * R * (6 + 5) * 2
    model = sum(x.nbytes for x in jax.tree.leaves(params(jnp.float64)))
    each = pair if method == "fr_lora" else N * pair
    np.testing.assert_allclose(metrics["bytes_catch_up"], [0, 0, min(2 * each, model)])
    assert machine.wire(state, every).catch_up == each


def test_masked_ranks_neither_learn_nor_decay():
    """With decay on, a client's slots beyond its rank stay zero, and so do their moments."""
    machine, _, state = setup("flexlora", ranks=(3, 1), **OPTIONS)
    strategy = machine.strategy
    a = jnp.ones_like(state.server.trainable["layers/kernel"].a)
    b = jnp.ones_like(state.server.trainable["layers/kernel"].b)
    download = strategy.broadcast(state.server)
    download = download._replace(trainable=download.trainable | {"layers/kernel": LoRA(a, b)})

    def batch(j):
        rows = plan(range(1)).samples[0, 1]
        return {k: x[jnp.asarray(rows)[j]] for k, x in machine.train.items()} | {
            "weight": jnp.ones(rows.shape[-1])
        }

    mine = jnp.int32(1), jnp.ones(()), jax.random.key(0)
    out = local_train(strategy, machine.loss, 3, download, (), batch, *mine)
    sent = out.upload.stack["layers/kernel"]
    assert DECAY and LR and not sent.a[..., 1:].any() and not sent.b[..., 1:, :].any()
    assert np.abs(sent.a[..., :1] - 1).max() > 1e-2
    nu = adam_state(out.opt).nu["layers/kernel"]
    assert not nu.a[..., 1:].any() and not nu.b[..., 1:, :].any()


def test_absent_clients_send_nothing_that_others_must_catch_up_on():
    """A missed round is priced by the uploads that this round has."""
    machine, _, state = setup("flora")
    large = machine.strategy._replace(export=lambda state: {"kernel": jnp.zeros((1000, 1000))})
    rows = absent(away(plan(range(2)), 2, 0), 1)
    _, metrics = machine._replace(strategy=large).rounds()(state, machine.train, rows, 2)
    pair = 4 * 3 * (m + n) * L
    assert metrics["bytes_catch_up"].tolist() == [0, (N - 1) * pair]
