"""Stragglers: a round by hand, the estimate over many draws, and methods that it can go around."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import OPTIONS, S, assert_model, client_batches, factors, start, trained
from problem import OPTIONS as COMMON
from problem import K, L, N, assert_close, m, n, params, plan, setup

from fedgalore_jax.strategies import build
from fedgalore_jax.strategies.adel_fl import adel_fl
from fedgalore_jax.strategies.base import Local, Ops, Upload
from fedgalore_jax.types import LowRank

SPEEDS, DEADLINE = (0.5, 1.0), 0.8


def chance(count, mean):
    """That at least `count` layers are done, as a sum that ends where nothing is left."""
    return sum(math.exp(-mean) * mean**k / math.factorial(k) for k in range(count, 60))


def done(state, t, client):
    """What a client finishes: of its head and last layer, the first layer, the embeddings."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(state.key, t), client), 1)
    times = np.cumsum(jax.random.exponential(jax.random.fold_in(key, 0), (L + 1,)))
    return np.asarray(times) <= SPEEDS[client % 2] * L * DEADLINE


@pytest.mark.usefixtures("x64")
def test_fedit_under_a_deadline():
    """Two rounds: what a client has not finished is not sent, what it has counts more than once."""
    options = {"base": "fedit", "speeds": SPEEDS, "deadline": DEADLINE, "min_chance": 0.3}
    w, bias, _ = start()
    _, _, state = setup("adel_fl", **options, **OPTIONS)
    a, b = factors(state)
    seen = []
    for t in range(2):
        now = {"a": a, "b": b, "bias": bias}
        moved = {k: np.zeros_like(x) for k, x in now.items()}
        for c, (p, batches) in enumerate(client_batches(t)):
            values, finished = trained(w, now, batches), done(state, t, c)
            mean = SPEEDS[c % 2] * L * DEADLINE
            share = [f / max(chance(k + 1, mean), 0.3) for k, f in enumerate(finished)]
            moved["bias"] += p * share[0] * (values["bias"] - bias)
            for layer in range(L):
                for k in "ab":
                    moved[k][layer] += p * share[L - 1 - layer] * (values[k] - now[k])[layer]
            seen.append(p * finished[:L].mean())
        a, b, bias = (now[k] + moved[k] for k in ("a", "b", "bias"))
    machine, rounds, state = setup("adel_fl", **options, **OPTIONS)
    state, metrics = rounds(state, machine.train, plan(range(2)), 2)
    out = machine.strategy.export(state.server)
    assert_model((out["layers"]["kernel"], out["classifier"]["bias"]), w + S * a @ b, bias)
    np.testing.assert_allclose(metrics["finished"], [sum(seen[:N]), sum(seen[N:])], rtol=1e-6)
    assert 0 < metrics["finished"][0] < 1


@pytest.mark.parametrize(
    "method",
    ["scaffold", *(pytest.param(m, marks=pytest.mark.slow) for m in ("fedavg", "galore_avg", "fedsa_lora"))],
)
def test_everyone_on_time_is_the_method_itself(method):
    """With the memories of the clients. Two programs: the last bit of a number is the compiler's."""
    machine, rounds, state = setup("adel_fl", base=method, deadline=1e4)
    got, metrics = rounds(state, machine.train, plan(range(2)), 2)
    machine, rounds, state = setup(method)
    want, _ = rounds(state, machine.train, plan(range(2)), 2)
    assert_close(got, want, 1e-6)
    assert metrics["finished"].tolist() == [1, 1]


@pytest.mark.usefixtures("x64")
def test_the_sum_over_clients_is_right_on_average():
    """Changes of kernels (as products), head and embeddings; the layers that clients finish are Poisson."""
    rng, draws, weights = np.random.default_rng(0), 4000, np.array([0.3, 0.7])
    rows = [
        {
            "layers/kernel": LowRank(rng.normal(size=(L, m, 2)), rng.normal(size=(L, 2, n))),
            "classifier/bias": rng.normal(size=n),
            "embeddings/shift": rng.normal(size=n),
        }
        for _ in weights
    ]
    base = build("fedavg", **COMMON)
    download = base.broadcast(base.init(params(jnp.float64), jax.random.key(0), 2))
    local = Local(download.trainable, (), ())
    got = {}
    for c, (p, row) in enumerate(zip(weights, rows, strict=True)):

        def finish(download, local, memory, ops, row=row):
            return Upload(mean={"change": row, "nu": row}, sum={"change": row}), {"row": row}

        late = adel_fl(base._replace(finish=finish), deadline=DEADLINE, speeds=SPEEDS, min_chance=1e-3)

        def one(key, c=c, late=late):
            ops = Ops(jnp.int32(c), jnp.ones(()), key, None, None, K)
            memory = jax.tree.map(jnp.zeros_like, {"row": rows[0]})
            return late.finish(download, local, memory, ops)

        upload, memory = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(7 + c), draws))
        change, sent = upload.mean["change"], upload.sum["change"]
        finished = {
            "layers/kernel": (np.asarray(sent["layers/kernel"].b) != 0).all((2, 3)),
            "classifier/bias": (np.asarray(sent["classifier/bias"]) != 0).all(1),
            "embeddings/shift": (np.asarray(sent["embeddings/shift"]) != 0).all(1),
        }
        mean = SPEEDS[c] * L * DEADLINE
        chances = {
            "layers/kernel": np.array([chance(L - layer, mean) for layer in range(L)]),
            "classifier/bias": chance(1, mean),
            "embeddings/shift": chance(L + 1, mean),
        }
        for path, q in chances.items():
            error = np.abs(finished[path].mean(0) - q) / np.sqrt(q * (1 - q) / draws)
            assert (error < 4).all(), path
            dense = np.asarray(change[path].a @ change[path].b if path[0] == "l" else change[path])
            got[path] = got.get(path, 0) + p * dense
        assert (finished["layers/kernel"][:, 0] <= finished["layers/kernel"][:, 1]).all()  # last layer first
        for path in ("classifier/bias", "embeddings/shift"):
            np.testing.assert_array_equal(memory["row"][path], sent[path])
        np.testing.assert_array_equal(upload.mean["nu"]["classifier/bias"][0], row["classifier/bias"])
    for path, estimates in got.items():
        want = sum(
            p * (row[path].a @ row[path].b if path[0] == "l" else row[path])
            for p, row in zip(weights, rows, strict=True)
        )
        assert estimates.std(0).max() > 0.1
        error = np.abs(estimates.mean(0) - want) / (estimates.std(0) / np.sqrt(draws))
        assert error.max() < 5, path


def test_moments_that_clients_keep_are_refused():
    """Their counts would go on where a layer's moments do not."""
    machine, _, state = setup("adel_fl", base="fedavg", moments="keep")
    with pytest.raises(ValueError, match="kept moments count steps that late layers did not take"):
        machine.wire(state, plan(range(1)))


@pytest.mark.parametrize("base", ["flora", "flexlora", "fedex_lora", "fedgalore"])
def test_stacked_uploads_are_refused(base):
    machine, _, state = setup("adel_fl", base=base)
    with pytest.raises(ValueError, match="the base of adel_fl sends uploads that are stacked"):
        machine.wire(state, plan(range(1)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deadline": 0.0}, "deadline=0.0"),
        ({"speeds": (1.0, -1.0)}, r"speeds=\(1.0, -1.0\)"),
        ({"speeds": 1.0}, "give a tuple of float"),
        ({"speeds": ("1",)}, "give a tuple of float"),
        ({"min_chance": 2.0}, "min_chance=2.0"),
        ({"base": "fedsgd"}, "unknown method 'fedsgd'"),
        ({"base": "adel_fl"}, "give a method that needs no base"),
        (
            {"b_ratio": 2.0},
            "its options are base, deadline, speeds, min_chance, client, moments, server_lr, lr",
        ),
        ({"base": "rolora", "b_ratio": -2.0}, "b_ratio=-2.0"),
        ({"ranks": (3, 1)}, "fedavg has one rank for all"),
    ],
)
def test_unusable_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        build("adel_fl", **COMMON | options)


def test_options_of_the_method_inside_reach_it():
    options = {"moments": "keep", "deadline": 1e4}
    _, _, state = setup("adel_fl", **options)
    assert jax.tree.structure(state.clients) == jax.tree.structure(setup("fedavg", moments="keep")[2].clients)
