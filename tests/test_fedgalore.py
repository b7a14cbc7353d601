"""FedGaLore: factored equals dense, plain GaLore as its special case, its options, its wire."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problem import (
    OPTIONS,
    K,
    L,
    N,
    assert_close,
    away,
    loss,
    m,
    n,
    params,
    plan,
    samples,
    setup,
    train_rounds,
)

from fedgalore_jax import tree
from fedgalore_jax.adapters import merge
from fedgalore_jax.galore import galore
from fedgalore_jax.lowrank import random_basis
from fedgalore_jax.strategies import build
from fedgalore_jax.strategies.base import Ops
from fedgalore_jax.strategies.fedgalore_options import Options, resolve
from fedgalore_jax.strategies.subspaces import transported
from fedgalore_jax.types import LowRank

EVERYTHING_ON = {
    "lr": optax.linear_schedule(0.05, 0.01, 4 * K),
    "weight_decay": 0.2,
    "clip": 0.7,
    "head_ratio": 0.5,
}
VARIANTS = {
    "ajive, the defaults": {},
    "mean, new basis every round": {"sync": "mean", "refresh_rounds": 1},
    "median, row means": {"sync": "median", "refresh_rounds": 2, "transport": "row_mean"},
    "no sync": {"sync": "none", "refresh_rounds": 1},
    "server basis, squared overlap": {
        "basis": "server",
        "refresh_rounds": 1,
        "transport": "squared_overlap",
        "sync_first": False,
    },
    "own bases": {"basis": "own", "finder": "gram", "transport": "keep"},
    "own bases, several batches": {"basis": "own", "basis_batches": 2, "sync": "mean"},
    "right side": {"side": "right", "refresh_rounds": 2, "transport": "squared_overlap"},
}


@pytest.mark.parametrize(
    ("variant", "bits"),
    [*((variant, 64) for variant in VARIANTS), ("ajive, the defaults", 32), ("own bases", 32)],
)
def test_factored_equals_dense(variant, bits):
    """F2 over whole rounds, with decay, clipping, a schedule and a head learning rate on."""
    options = EVERYTHING_ON | VARIANTS[variant]
    with jax.enable_x64(bits == 64):
        dtype = np.float64 if bits == 64 else np.float32
        out = {
            weights: train_rounds("fedgalore", 4, dtype=dtype, client_weights=weights, **options)
            for weights in ("factored", "dense")
        }
    tolerance = 1e-10 if bits == 64 else 1e-5
    assert_close(out["factored"][0], out["dense"][0], tolerance)
    metrics = [{k: v for k, v in run[2].items() if k != "bytes_catch_up"} for run in out.values()]
    assert_close(*metrics, 1e-8 if bits == 64 else 1e-3)  # dense clients download the weights anyway


@pytest.mark.usefixtures("x64")
def test_one_client_with_its_own_basis_is_plain_galore():
    """Without synchronisation a round is K steps of the optax transform with one refresh."""
    options = {"basis": "own", "sync": "none", "finder": "svd", "weight_decay": 0.1, "clip": 0.0}
    machine, rounds, state = setup("fedgalore", dtype=np.float64, chunk=1, **options)
    rows = plan(range(1), cohort=1)
    state, _ = rounds(state, machine.train, rows, 1)
    got = tree.flatten(machine.strategy.export(state.server))

    want = tree.flatten(params(jnp.float64))
    trained = {path: want[path] for path in ("layers/kernel", "classifier/bias")}
    tx = galore(
        0.05, 3, refresh_every=K, scale=1.0, finder="svd", side="left", b1=0.9, b2=0.999,
        eps=1e-6, weight_decay=0.0,
    )  # fmt: skip
    decay = optax.add_decayed_weights(0.1, {"layers/kernel": True, "classifier/bias": False})
    opt, decay_state = tx.init(trained), decay.init(trained)
    data = samples(np.float64)
    for j in range(K):
        batch = {k: jnp.asarray(v[rows.samples[0, 0, j]]) for k, v in data.items()}
        batch["weight"] = jnp.asarray(rows.weight[0, 0])
        grads = jax.grad(lambda t, b=batch: loss(tree.unflatten(want | t), b, None))(trained)
        updates, opt = tx.update(grads, opt, trained)
        decayed, _ = decay.update(jax.tree.map(jnp.zeros_like, trained), decay_state, trained)
        updates = jax.tree.map(lambda u, d: u - 0.05 * d, updates, decayed)
        trained = optax.apply_updates(trained, updates)
    assert_close(got, want | trained, 1e-10)


def test_the_base_product_is_not_batched_over_clients():
    """F3: the frozen kernel keeps its own shape in every product of the vmapped client."""
    machine, _, state = setup("fedgalore")
    one = jax.tree.map(lambda x: x[0], plan(range(1)))
    text = str(jax.make_jaxpr(machine.round)(state, machine.train, one))
    assert f"[{N},{m},{n}]" not in text and f"[{N},{L},{m},{n}]" not in text
    dense, _, state = setup("fedgalore", client_weights="dense")
    assert f"[{N},{L},{m},{n}]" in str(jax.make_jaxpr(dense.round)(state, dense.train, one))


def test_counters_are_not_batched_over_clients():
    """F1: a batched counter would turn every branch that hangs on it into both branches."""
    batched = re.compile(rf"i32\[{N}\] = add \w+ 1:i32\[\]")
    assert batched.search(str(jax.make_jaxpr(jax.vmap(lambda count: count + 1))(jnp.arange(N))))
    for method in ("fedgalore", "fedavg", "fedit"):
        machine, _, state = setup(method)
        one = jax.tree.map(lambda x: x[0], plan(range(1)))
        text = str(jax.make_jaxpr(machine.round)(state, machine.train, one))
        assert not batched.search(text)


def test_shared_bases_follow_the_seed_and_the_refresh():
    machine, rounds, state = setup("fedgalore", refresh_rounds=2)
    path, seen = "layers/kernel", []
    for t in range(4):
        seen.append(np.asarray(state.server.extra.basis[path]))
        np.testing.assert_array_equal(seen[-1], seeded(state.server.extra.seed, t // 2))
        state, _ = rounds(state, machine.train, plan(range(t, t + 1)), 1)
    np.testing.assert_array_equal(seen[0], seen[1])
    assert np.abs(seen[1] - seen[2]).max() > 0.1


def test_server_basis_holds_the_leading_directions_of_the_mean_change():
    before = params()["layers"]["kernel"]
    out, state, _ = train_rounds("fedgalore", 1, basis="server", refresh_rounds=1)
    change = np.asarray(out["layers"]["kernel"] - before, np.float64)
    basis = np.asarray(state.server.extra.basis["layers/kernel"], np.float64)
    for l in range(L):
        np.testing.assert_allclose(basis[l].T @ basis[l], np.eye(3), atol=1e-5)
        best = (np.linalg.svd(change[l])[1][:2] ** 2).sum()
        assert (np.square(basis[l].T @ change[l])).sum() > 0.999 * best


def test_own_bases_differ_between_clients_and_average_in_full_space():
    machine, _, state = setup("fedgalore", basis="own")
    out, _, _ = train_rounds("fedgalore", 1, basis="own")
    change = np.asarray(out["layers"]["kernel"] - params()["layers"]["kernel"])
    rank = np.linalg.matrix_rank(change[0], tol=1e-5)
    assert rank > OPTIONS["rank"]
    assert machine.strategy.broadcast(state.server).extra.basis == ()


def test_transport():
    rng = np.random.default_rng(0)
    old = np.linalg.qr(rng.normal(size=(40, 4)))[0]
    new = np.linalg.qr(rng.normal(size=(40, 4)))[0]
    nu = rng.uniform(size=(4, 7))
    np.testing.assert_array_equal(transported(nu, old, new, "keep"), nu)
    rows = np.asarray(transported(nu, old, new, "row_mean"))
    np.testing.assert_allclose(rows, np.tile(nu.mean(0), (4, 1)), rtol=1e-6)
    overlap = (new.T @ old) ** 2
    want = overlap / overlap.sum(1, keepdims=True) @ nu
    np.testing.assert_allclose(transported(nu, old, new, "squared_overlap"), want, rtol=1e-5)
    np.testing.assert_allclose(transported(nu, old, old, "squared_overlap"), nu, rtol=1e-5)


def test_first_moment_is_rotated_into_the_new_basis():
    machine, rounds, state = setup("fedgalore", refresh_rounds=2, sync="mean")
    state, _ = rounds(state, machine.train, plan(range(1)), 1)
    before = state.server.extra
    kept, _ = setup("fedgalore", refresh_rounds=9, sync="mean")[1](state, machine.train, plan(range(1, 2)), 1)
    turned, _ = rounds(state, machine.train, plan(range(1, 2)), 1)
    path = "layers/kernel"
    overlap = turned.server.extra.basis[path].mT @ before.basis[path]
    np.testing.assert_allclose(
        turned.server.extra.adam.mu[path], overlap @ kept.server.extra.adam.mu[path], atol=1e-5
    )


def test_joint_ranks_are_reported_per_layer():
    _, _, metrics = train_rounds("fedgalore", 2, sync="ajive", signal_rank=2)
    ranks = np.asarray(metrics["joint_rank/layers/kernel"])
    assert ranks.shape == (2, L) and ((ranks >= 0) & (ranks <= 2)).all()


def test_download_is_rebuilt_from_what_travelled():
    """A client that holds the last round's weights needs the mean Z, the moments and a seed."""
    options = {"refresh_rounds": 2, "weight_decay": 0.1, "sync": "mean"}
    machine, rounds, state = setup("fedgalore", **options)
    strategy = machine.strategy
    held = strategy.broadcast(state.server)
    for t in range(3):
        state, _ = rounds(state, machine.train, plan(range(t, t + 1)), 1)
        sent = strategy.broadcast(state.server)
        ((wire,), _) = strategy.wire_down(sent)
        path = "layers/kernel"
        old_basis = seeded(wire["seed"], t // 2)
        z, shrink = wire["step"][path], wire["step"]["shrink"]
        w = held.frozen[path] + merge(LowRank(old_basis, z)) + shrink * held.frozen[path]
        np.testing.assert_allclose(w, sent.frozen[path], atol=1e-6)
        bias = held.trainable["classifier/bias"] + wire["step"]["classifier/bias"]
        np.testing.assert_allclose(bias, sent.trainable["classifier/bias"], atol=1e-6)
        np.testing.assert_array_equal(seeded(wire["seed"], (t + 1) // 2), sent.extra.basis[path])
        assert_close(wire["nu"], sent.extra.adam.nu, 0)
        assert_close(wire["mu"], sent.extra.adam.mu, 0)
        held = sent


@pytest.mark.parametrize(
    ("method", "options", "floats"),
    [
        ("fedgalore", {"weight_decay": 0.1}, L * 3 * n + 1),
        ("fedgalore", {"basis": "server", "refresh_rounds": 3}, L * 3 * n + L * m),
        ("fedlore", {}, L * 3 * n),
        ("fedgalore", {"basis": "own"}, 0),
        ("fedgalore", {"client_weights": "dense", "basis": "server"}, 0),
    ],
)
def test_catching_up_is_counted(method, options, floats):
    """A client that missed rounds replays their mean steps, at most until the model costs less."""
    machine, rounds, state = setup(method, **options)
    four = plan(range(4))
    assert machine.wire(state, four).catch_up == 4 * floats
    if not floats:
        return
    missing = away(away(four, 2, 0), 4, 1, 2)  # one client misses the first round, one the next two
    _, metrics = rounds(state, machine.train, missing, 4)
    model = sum(x.nbytes for x in jax.tree.leaves(params()))
    want = [0, min(4 * floats, model), 0, min(2 * 4 * floats, model)]
    np.testing.assert_array_equal(metrics["bytes_catch_up"], want)


def seeded(seed, epoch):
    """The shared basis of some rounds, as a client makes it: from the seed and shapes alone."""
    key = jax.random.fold_in(jax.random.fold_in(seed, epoch), 0)
    return random_basis(key, (1, L, m), OPTIONS["rank"])[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"basis": "mine"}, "basis='mine' is not one of shared, server, own"),
        ({"sync": "max"}, "sync='max' is not one of none, mean, median, ajive"),
        ({"basis": "own", "refresh_rounds": 5}, "refresh_rounds=5"),
        ({"basis": "own", "transport": "squared_overlap"}, "squared_overlap"),
        ({"refresh_rounds": 0}, "refresh_rounds=0"),
        ({"signal_rank": 3}, "signal_rank=3 must lie in 1..rank-1"),
        ({"signal_rank": 2, "sync": "mean"}, "signal_rank=2 would have no effect: it needs sync=ajive"),
        ({"finder": "svd"}, "finder='svd' would have no effect: it needs basis=own"),
        ({"sync_first": True, "basis": "own"}, "sync_first=True needs a common basis"),
        ({"rank": 1}, "rank=1 leaves AJIVE no room"),
        ({"rank": 1, "sync": "mean", "basis": "server"}, "rank=1: a server basis"),
        ({"floor": -1.0}, "floor=-1.0"),
        ({"joint_rank": 2}, "joint_rank=2"),
        ({"client_weights": "both"}, "client_weights='both'"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        build("fedgalore", **(OPTIONS | options))


def test_rank_that_is_no_subspace():
    strategy = build("fedgalore", **(OPTIONS | {"rank": m}))
    with pytest.raises(ValueError, match="rank=6 is no subspace of the left side of layers/kernel"):
        strategy.init(params(), jax.random.key(0), N)


def test_bytes_of_a_large_model_fit():
    """One of 16 GB, which is traced alone."""
    machine, _, state = setup("fedgalore")
    large = machine.strategy._replace(export=lambda state: {"kernel": jnp.zeros((1 << 16, 1 << 16))})
    one = jax.tree.map(lambda x: x[0], plan(range(1)))
    _, metrics = jax.eval_shape(machine._replace(strategy=large).round, state, machine.train, one)
    assert metrics["bytes_catch_up"].shape == ()


def chosen(**options):
    return Options(
        **(
            {name: None for name in Options._fields}
            | {"client_weights": "factored", "side": "left"}
            | options
        )
    )


def test_what_is_left_to_default():
    o = resolve(chosen(basis="shared", sync="ajive"), 8)
    assert (o.refresh_rounds, o.sync_first, o.transport, o.signal_rank, o.floor) == (5, True, "keep", 4, 1e-3)
    o = resolve(chosen(basis="own", sync="ajive"), 8)
    assert (o.refresh_rounds, o.sync_first, o.transport, o.finder, o.basis_batches) == (
        1,
        False,
        "row_mean",
        "subspace",
        1,
    )
    assert not resolve(chosen(basis="shared", sync="none"), 8).sync_first


def test_an_own_basis_may_come_from_the_mean_of_several_batches():
    strategy = build(
        "fedgalore", **(OPTIONS | {"basis": "own", "basis_batches": 3, "finder": "svd", "sync": "none"})
    )
    grads = np.random.default_rng(0).normal(size=(3, L, m, n)).astype(np.float32)
    download = strategy.broadcast(strategy.init(params(), jax.random.key(0), N))

    def value_and_grad(assemble, tree, j):
        return jnp.float32(j), {path: jnp.asarray(grads[j]) if x.ndim > 1 else x for path, x in tree.items()}

    local = strategy.start(
        download, (), Ops(jnp.int32(0), jnp.ones(()), jax.random.key(0), value_and_grad, None, K)
    )
    basis = np.asarray(local.extra["layers/kernel"])
    want = np.linalg.svd(grads.sum(0))[0][..., :3]
    np.testing.assert_allclose(basis @ basis.mT, want @ want.mT, atol=1e-5)
    assert float(local.first[0]) == 0
