"""Federated LoRA methods against float64 NumPy, two or three rounds each; and what their servers hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import DECAY, LR, OPTIONS, Adam, client_batches, run, start
from problem import N, gradients, params, plan, setup

from fedgalore_jax.client import local_train
from fedgalore_jax.optimizer import adam_state
from fedgalore_jax.strategies import build
from fedgalore_jax.strategies.base import Cohort, Ops, Upload
from fedgalore_jax.types import LoRA

S, R = 2.0, 3
pytestmark = pytest.mark.usefixtures("x64")


def T(x):
    return x.swapaxes(-1, -2)


def factors(state):
    """The server's first factors, as the library draws them."""
    return tuple(np.asarray(x) for x in state.server.trainable["layers/kernel"])


def trained(
    base, values, batches, *, s=S, learn=("a", "b", "bias"), more=lambda values: {}, rate=None, keep=None
):
    """A client's round of LoRA: AdamW on what it learns, next to a frozen base.

    `more(values)` are gradients of its own beside the loss's, `rate` multiples of the learning rate, and
    `keep` masks of what may move.
    """
    rate, keep = rate or {}, keep or {}
    values = dict(values)
    adam = Adam({k: values[k].shape for k in learn})
    for x, y in batches:
        a, b = values["a"], values["b"]
        dw, db = gradients(base + s * a @ b, values["bias"], start()[2], x, y)
        grads = {"a": s * dw @ T(b), "b": s * T(a) @ dw, "bias": db}
        grads = {k: g + more(values).get(k, 0) for k, g in grads.items() if k in learn}
        grads = {k: g * keep.get(k, 1) for k, g in grads.items()}
        before = dict(values)
        adam.step(values, grads, {"a", "b"})
        for k in grads:
            values[k] = before[k] + rate.get(k, 1) * keep.get(k, 1) * (values[k] - before[k])
    return values


def mean_of(rows, key):
    return sum(p * values[key] for p, values in rows)


def every_client(t, train):
    return [(p, train(c, batches)) for c, (p, batches) in enumerate(client_batches(t))]


def assert_ends(got, w, bias):
    np.testing.assert_allclose(got[0], w, atol=1e-9)
    np.testing.assert_allclose(got[1], bias, atol=1e-9)


def test_ffa_lora_trains_b_alone():
    w, bias, _ = start()
    _, _, state = setup("ffa_lora", **OPTIONS)
    a = np.asarray(state.server.extra["layers/kernel"])
    b = np.zeros((*a.shape[:-2], R, w.shape[-1]))
    for t in range(2):
        now = {"a": a, "b": b, "bias": bias}
        rows = every_client(t, lambda _, x, now=now: trained(w, now, x, learn=("b", "bias")))
        exact = sum(p * values["a"] @ values["b"] for p, values in rows)
        b, bias = mean_of(rows, "b"), mean_of(rows, "bias")
        np.testing.assert_allclose(a @ b, exact, atol=1e-12)
    got = run("ffa_lora", 2)
    assert_ends(got, w + S * a @ b, bias)
    np.testing.assert_array_equal(got[2].server.extra["layers/kernel"], a)


def test_rolora_alternates_by_the_parity_of_the_round():
    """Three rounds: B, A, B; the resting factor neither learns nor decays."""
    w, bias, _ = start()
    machine, rounds, state = setup("rolora", **OPTIONS)
    a, b = factors(state)
    for t in range(3):
        now = {"a": a, "b": b, "bias": bias}
        learn = ("ba"[t % 2], "bias")
        rows = every_client(t, lambda _, x, now=now, learn=learn: trained(w, now, x, learn=learn))
        a, b, bias = (mean_of(rows, k) for k in ("a", "b", "bias"))
    for t in range(3):
        before = factors(state)
        state, _ = rounds(state, machine.train, plan(range(t, t + 1)), 1)
        resting = "ab"[t % 2]
        np.testing.assert_array_equal(factors(state)["ab".index(resting)], before["ab".index(resting)])
    assert rounds._cache_size() == 1
    out = machine.strategy.export(state.server)
    assert_ends((out["layers"]["kernel"], out["classifier"]["bias"]), w + S * a @ b, bias)


def test_lora_a2_scores_and_masks():
    """A scoring pass on the round's own batches, then the same steps within the mask, from the start."""
    w, bias, _ = start()
    options = {"local_rank": 1, "b_ratio": 3.0}
    a, b = factors(setup("lora_a2", **options, **OPTIONS)[2])
    for t in range(3):
        on = "ba"[t % 2]

        def train(_, batches, a=a, b=b, bias=bias, on=on):
            now = {"a": a, "b": b, "bias": bias}
            rate = {"b": 3.0}
            moved = trained(w, now, batches, learn=(on, "bias"), rate=rate)[on] - now[on]
            columns, rows = (np.linalg.norm(x, axis=i) for x, i in ((a, -2), (b, -1)))
            scores = np.linalg.norm(moved, axis=-1 if on == "b" else -2) * (columns if on == "b" else rows)
            keep = scores >= np.sort(scores.ravel())[-2]  # one for each of two layers, jointly
            keep = keep[..., None] if on == "b" else keep[..., None, :]
            return trained(w, now, batches, learn=(on, "bias"), rate=rate, keep={on: keep})

        rows = every_client(t, train)
        a, b, bias = (mean_of(rows, k) for k in ("a", "b", "bias"))
    assert_ends(run("lora_a2", 3, **options), w + S * a @ b, bias)


def test_fedsa_lora_shares_a_and_keeps_b():
    w, bias, _ = start()
    machine, _, state = setup("fedsa_lora", **OPTIONS)
    a = np.asarray(state.server.trainable["layers/kernel"])
    own = [{"b": np.zeros((*a.shape[:-2], R, w.shape[-1])), "bias": bias} for _ in range(N)]
    for t in range(2):
        rows = every_client(t, lambda c, x, a=a, own=own: trained(w, {"a": a} | own[c], x))
        a, own = mean_of(rows, "a"), [{k: v[k] for k in ("b", "bias")} for _, v in rows]
    _, _, state = run("fedsa_lora", 2)
    assert machine.strategy.personal
    for c in range(N):
        memory = jax.tree.map(lambda rows, c=c: rows[c], state.clients)
        out = machine.strategy.export(state.server, memory)
        assert_ends(
            (out["layers"]["kernel"], out["classifier"]["bias"]), w + S * a @ own[c]["b"], own[c]["bias"]
        )
    np.testing.assert_array_equal(machine.strategy.export(state.server)["layers"]["kernel"], w)


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
    assert_ends(got, exact, bias)
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
            ops = Ops(jnp.int32(c), jax.random.fold_in(key, 1), None, None)
            drawn = strategy.start(download, (), ops).trainable["layers/kernel"]
            rank = ranks[c % 2]
            assert not np.asarray(drawn.a)[..., rank:].any() and np.asarray(drawn.a)[..., :rank].all()
            a, b = np.asarray(drawn.a)[..., :rank], np.asarray(drawn.b)[..., :rank, :]
            return trained(base, {"a": a, "b": b, "bias": bias}, batches, s=alpha / rank)

        rows = every_client(t, train)
        base = base + sum(p * alpha / ranks[c % 2] * v["a"] @ v["b"] for c, (p, v) in enumerate(rows))
        bias = mean_of(rows, "bias")
    assert_ends(run("flora", 2, ranks=ranks, lora_alpha=alpha), base, bias)


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
    assert_ends(run("flexlora", 2, ranks=ranks, lora_alpha=alpha), w + a @ b, bias)


def test_hetlora_pads_weighs_by_norm_and_shrinks():
    options = {"gamma": 0.7, "lam": 300.0, "ranks": (3, 2)}
    w, bias, _ = start()
    _, _, state = setup("hetlora", **options, **OPTIONS)
    a, b = factors(state)
    rank = [options["ranks"][c % 2] for c in range(N)]

    def tails(values, r):
        j = int(np.floor(0.7 * r))
        a, b = values["a"][..., j:r], values["b"][..., j:r, :]
        return j, [np.sqrt((x**2).sum((-2, -1), keepdims=True) + 1e-12) for x in (a, b)]

    for t in range(3):

        def train(c, batches, a=a, b=b, bias=bias):
            r = rank[c]
            received = {"a": a[..., :r], "b": b[..., :r, :], "bias": bias}

            def penalty(values):
                j, (na, nb) = tails(values, r)
                ga, gb = np.zeros_like(values["a"]), np.zeros_like(values["b"])
                ga[..., j:r] = options["lam"] * nb / na * values["a"][..., j:r]
                gb[..., j:r, :] = options["lam"] * na / nb * values["b"][..., j:r, :]
                return {"a": ga, "b": gb}

            out = trained(w, received, batches, more=penalty)
            after, before = (np.multiply(*tails(v, r)[1]).sum() for v in (out, received))
            if after < before:
                rank[c] = max(1, int(np.floor(0.7 * r)))
            return out | {"a": out["a"][..., : rank[c]], "b": out["b"][..., : rank[c], :]}

        rows = every_client(t, train)
        norms = [np.linalg.norm(v["a"] @ v["b"], axis=(-2, -1), keepdims=True) for _, v in rows]
        a, b = np.zeros_like(a), np.zeros_like(b)
        for (_, v), q in zip(rows, norms / sum(norms), strict=True):
            k = v["a"].shape[-1]
            a[..., :k] += q * v["a"]
            b[..., :k, :] += q * v["b"]
        bias = mean_of(rows, "bias")
    got = run("hetlora", 3, **options)
    shrank = rank != [options["ranks"][c % 2] for c in range(N)]
    assert shrank and got[2].clients["rank"].tolist() == rank
    assert_ends(got, w + S * a @ b, bias)


def fedit_round(w, a, b, bias, t):
    now = {"a": a, "b": b, "bias": bias}
    rows = every_client(t, lambda _, x: trained(w, now, x))
    exact = sum(p * values["a"] @ values["b"] for p, values in rows)
    return exact, *(mean_of(rows, k) for k in ("a", "b", "bias"))


def test_lora_fair_descends_the_cosine():
    w, bias, _ = start()
    (a, b), lam = factors(setup("lora_fair", **OPTIONS)[2]), 0.01
    for t in range(2):
        target, a, b, bias = fedit_round(w, a, b, bias, t)
        db = np.zeros_like(b)
        size = np.linalg.norm(target, axis=(-2, -1), keepdims=True)
        before = (
            1
            - (target * (a @ b)).sum((-2, -1))
            / (size * np.linalg.norm(a @ b, axis=(-2, -1), keepdims=True))[..., 0, 0]
        )
        for _ in range(200):  # the gradient on dense matrices
            now = a @ (b + db)
            own = np.linalg.norm(now, axis=(-2, -1), keepdims=True)
            dot = (target * now).sum((-2, -1), keepdims=True)
            d_now = -target / (size * own) + dot * now / (size * own**3)
            db = db - 0.1 * (T(a) @ d_now + 2 * lam * db)
        after = 1 - (target * now).sum((-2, -1)) / (size * own)[..., 0, 0]
        assert (after < before).all()
        b = b + db
    got = run("lora_fair", 2)
    np.testing.assert_allclose(got[0], w + S * a @ b, atol=1e-6)  # eps under the root
    np.testing.assert_allclose(got[1], bias, atol=1e-6)


def test_lora_fair_ls_solves_the_ridge_problem():
    w, bias, _ = start()
    (a, b), lam = factors(setup("lora_fair", **OPTIONS)[2]), 0.01
    for t in range(2):
        target, a, b, bias = fedit_round(w, a, b, bias, t)
        normal = T(a) @ a + lam * np.eye(R)
        b = b + np.linalg.solve(normal, T(a) @ (target - a @ b))
    assert_ends(run("lora_fair", 2, solver="ls"), w + S * a @ b, bias)


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
    assert_ends(run("fr_lora", 3), base + S * got_a @ got_b, bias)


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
    away = np.arange(N) == 2
    counts = every.counts.copy()
    counts[:2, away] = 0
    _, metrics = rounds(state, machine.train, every._replace(counts=counts), 3)
    pair = 8 * R * (6 + 5) * 2
    model = sum(x.nbytes for x in jax.tree.leaves(params(jnp.float64)))
    each = pair if method == "fr_lora" else N * pair
    np.testing.assert_allclose(metrics["bytes_catch_up"], [0, 0, min(2 * each, model)])
    assert machine.wire(state, every).catch_up == each


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("fedit", {"ranks": (1, 3)}, "fedit has one rank for all"),
        ("flora", {"ranks": (1, 2)}, r"ranks=\(1, 2\) is not usable: give a largest rank of 3"),
        ("flora", {"ranks": (0, 3)}, "integers >= 1"),
        ("hetlora", {"gamma": 1.0}, "gamma=1.0"),
        ("hetlora", {"min_rank": 4}, "min_rank=4"),
        ("lora_fair", {"solver": "svd"}, "solver='svd'"),
        ("lora_fair", {"lam": 0.0}, "lam=0.0"),
        ("rolora", {"b_ratio": 0.0}, "b_ratio=0.0"),
        ("lora_a2", {"local_rank": 3}, "local_rank=3"),
    ],
)
def test_unusable_options_are_named(method, options, message):
    with pytest.raises(ValueError, match=message):
        setup(method, **options)


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

    out = local_train(strategy, machine.loss, 3, download, (), batch, jnp.int32(1), jax.random.key(0))
    sent = out.upload.stack["layers/kernel"]
    assert DECAY and LR and not sent.a[..., 1:].any() and not sent.b[..., 1:, :].any()
    assert np.abs(sent.a[..., :1] - 1).max() > 1e-2
    nu = adam_state(out.opt).nu["layers/kernel"]
    assert not nu.a[..., 1:].any() and not nu.b[..., 1:, :].any()
