"""Federated LoRA methods that average factors against float64 NumPy, two or three rounds each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import (
    OPTIONS,
    Adam,
    R,
    S,
    T,
    assert_model,
    client_batches,
    every_client,
    factors,
    mean_of,
    run,
    start,
    trained,
)
from problem import K, N, away, gradients, plan, setup

pytestmark = pytest.mark.usefixtures("x64")


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
    assert_model(got, w + S * a @ b, bias)
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
    assert rounds.args[0]._cache_size() == 1
    out = machine.strategy.export(state.server)
    assert_model((out["layers"]["kernel"], out["classifier"]["bias"]), w + S * a @ b, bias)


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
    assert_model(run("lora_a2", 3, **options), w + S * a @ b, bias)


@pytest.mark.parametrize("method", ["rolora", "lora_a2"])
def test_a_client_that_was_away_needs_the_factor_that_rests(method):
    """Once, however long it was away: the round itself brings the one that was trained last."""
    machine, rounds, state = setup(method, **OPTIONS)
    four = plan(range(4))
    _, metrics = rounds(state, machine.train, away(away(four, 1, 0), 2, 1, 2), 4)
    a, b = (8 * x.size for x in factors(state))
    np.testing.assert_array_equal(metrics["bytes_catch_up"], [0, (a + b) / 2, 0, (a + b) / 2])
    assert machine.wire(state, four).catch_up == (a + b) / 2


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
        assert_model(
            (out["layers"]["kernel"], out["classifier"]["bias"]), w + S * a @ own[c]["b"], own[c]["bias"]
        )
    np.testing.assert_array_equal(machine.strategy.export(state.server)["layers"]["kernel"], w)


def test_dual_adapter_trains_the_private_half_first():
    """One of three steps for the private adapter, then two for the shared one; both restart Adam."""
    lam, learn = 0.3, (("a1", "b1", "bias"), ("a0", "b0", "bias"))
    w, bias, shift = start()
    _, _, state = setup("dual_adapter", lam=lam, **OPTIONS)
    a, b = factors(state)
    first = np.asarray(state.server.extra["layers/kernel"].a)
    own = [{"a1": first, "b1": np.zeros_like(b)} for _ in range(N)]

    def train(c, batches):
        values = {"a0": a, "b0": b, "bias": bias} | own[c]
        for half, part in zip(learn, (batches[:1], batches[1:]), strict=True):
            adam = Adam({k: values[k].shape for k in half})
            for x, y in part:
                a0, b0, a1, b1 = (values[k] for k in ("a0", "b0", "a1", "b1"))
                dw, db = gradients(w + S * (a0 @ b0 + a1 @ b1), values["bias"], shift, x, y)
                grads = {"b0": S * T(a0) @ dw, "b1": S * T(a1) @ dw, "bias": db}
                grads["a0"] = S * dw @ T(b0) + 2 * lam * a1 @ T(a1) @ a0
                grads["a1"] = S * dw @ T(b1) + 2 * lam * a0 @ T(a0) @ a1
                adam.step(values, {k: grads[k] for k in half}, {"a0", "b0", "a1", "b1"})
        return values

    for t in range(2):
        rows = every_client(t, train)
        a, b, bias = (mean_of(rows, k) for k in ("a0", "b0", "bias"))
        own = [{k: v[k] for k in ("a1", "b1")} for _, v in rows]
    shared = run("dual_adapter", 2, lam=lam)
    assert_model(shared, w + S * a @ b, bias)
    strategy = setup("dual_adapter", lam=lam, **OPTIONS)[0].strategy
    for c in range(N):
        memory = jax.tree.map(lambda rows, c=c: rows[c], shared[2].clients)
        out = strategy.export(shared[2].server, memory)
        personal = w + S * (a @ b + own[c]["a1"] @ own[c]["b1"])
        assert_model((out["layers"]["kernel"], out["classifier"]["bias"]), personal, bias)
        assert np.abs(personal - w - S * a @ b).max() > 1e-3


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
    assert_model(got, w + S * a @ b, bias)


def test_hetlora_keeps_what_only_the_absent_hold():
    """Clients of rank 1 alone leave the other components be, until nobody holds them any more."""
    machine, rounds, state = setup("hetlora", ranks=(3, 1), **OPTIONS)
    state, _ = rounds(state, machine.train, plan(range(1)), 1)
    low = plan(range(1, 2))
    for client in (0, 2, 4):
        low = away(low, client, 0)
    after, _ = rounds(state, machine.train, low, 1)
    assert after.server.extra.tolist() == [5, 3, 3]
    (a, b), (new_a, new_b) = factors(state), factors(after)
    np.testing.assert_array_equal(new_a[..., 1:], a[..., 1:])
    np.testing.assert_array_equal(new_b[..., 1:, :], b[..., 1:, :])
    assert np.abs(new_a[..., :1] - a[..., :1]).max() > 1e-3
    nobody = after._replace(server=after.server._replace(extra=jnp.array([5.0, 0, 0])))
    last, _ = rounds(nobody, machine.train, low, 1)
    assert not factors(last)[0][..., 1:].any() and factors(last)[0][..., :1].all()


def test_ilora_splits_by_qr_and_corrects_within_the_rank():
    """Ranks 3 and 1: what a client does not train stays in its model as it was sent, and counts so."""
    ranks, learn = (3, 1), ("a", "b", "bias")
    w, bias, shift = start()

    def split(matrix):
        """Q and R of the matrix as torch would hold it, out x in."""
        q, r = np.linalg.qr(T(matrix))
        return T(r[..., :R, :]), T(q[..., :R])

    a, b = split(w)
    base, a = w - a @ b, a / S
    now = {"a": a, "b": b, "bias": bias}
    c = {k: np.zeros_like(x) for k, x in now.items()}
    own = [dict(c) for _ in range(N)]
    holders = {"a": [5, 3, 3], "b": np.reshape([5, 3, 3], (R, 1)), "bias": 5}
    for t in range(2):
        rows, moved = [], {k: 0 for k in learn}
        for client, (p, batches) in enumerate(client_batches(t)):
            keep = np.arange(R) < ranks[client % 2]
            keep = {"a": keep, "b": keep[:, None], "bias": 1}
            values, adam = dict(now), Adam({k: x.shape for k, x in now.items()})
            seen = {k: 0 for k in learn}
            for x, y in batches:
                full = base + S * values["a"] @ values["b"]
                dw, db = gradients(full, values["bias"], shift, x, y)
                raw = {"a": S * dw @ T(values["b"]), "b": S * T(values["a"]) @ dw, "bias": db}
                raw = {k: keep[k] * g for k, g in raw.items()}
                seen = {k: seen[k] + raw[k] / K for k in learn}
                grads = {k: raw[k] + keep[k] * (c[k] - own[client][k]) for k in learn}
                before = dict(values)
                adam.step(values, grads, {"a", "b"})
                values = {k: before[k] + keep[k] * (values[k] - before[k]) for k in learn}
            moved = {k: moved[k] + seen[k] - own[client][k] for k in learn}
            own[client] = seen
            rows.append((p, values))
        c = {k: c[k] + moved[k] / holders[k] for k in learn}
        product = sum(p * values["a"] @ values["b"] for p, values in rows)
        a, b = split(product)
        now = {"a": a, "b": b, "bias": mean_of(rows, "bias")}
        lost = 1 - (np.linalg.norm(a @ b) / np.linalg.norm(product)) ** 2
    machine, rounds, state = setup("ilora", ranks=ranks, **OPTIONS)
    state, metrics = rounds(state, machine.train, plan(range(2)), 2)
    out = machine.strategy.export(state.server)
    assert_model((out["layers"]["kernel"], out["classifier"]["bias"]), base + S * a @ b, now["bias"])
    np.testing.assert_allclose(metrics["lost"][1], lost, rtol=1e-5)
    assert lost > 1e-4


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
        rate = 0.1 * np.minimum(1, ((a @ b) ** 2).sum((-2, -1), keepdims=True))
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
            db = db - rate * (T(a) @ d_now + 2 * lam * db)
        after = 1 - (target * now).sum((-2, -1)) / (size * own)[..., 0, 0]
        assert (after < before).all()
        b = b + db
    got = run("lora_fair", 2)
    np.testing.assert_allclose(got[0], w + S * a @ b, atol=1e-6)  # eps under the root
    np.testing.assert_allclose(got[1], bias, atol=1e-6)


@pytest.mark.parametrize("lr", [1e-3, 1e-5])
def test_lora_fair_stays_small_where_products_are(lr):
    """After few small steps B is corrected, not thrown about: both terms of what it minimises count."""
    machine, _, state = setup("lora_fair", **OPTIONS | {"lr": lr, "weight_decay": 0.0})
    corrected, _ = machine.rounds()(state, machine.train, plan(range(1)), 1)
    plain, rounds, begin = setup("fedit", **OPTIONS | {"lr": lr, "weight_decay": 0.0})
    averaged, _ = rounds(begin, plain.train, plan(range(1)), 1)
    (a, b), (same, mean) = factors(corrected), factors(averaged)
    np.testing.assert_allclose(a, same, atol=1e-12)
    assert 0 < np.linalg.norm(b - mean) < 0.1 * np.linalg.norm(mean)


def test_lora_fair_ls_solves_the_ridge_problem():
    w, bias, _ = start()
    (a, b), lam = factors(setup("lora_fair", **OPTIONS)[2]), 0.01
    for t in range(2):
        target, a, b, bias = fedit_round(w, a, b, bias, t)
        normal = T(a) @ a + lam * np.eye(R)
        b = b + np.linalg.solve(normal, T(a) @ (target - a @ b))
    assert_model(run("lora_fair", 2, solver="ls"), w + S * a @ b, bias)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("fedit", {"ranks": (1, 3)}, "fedit has one rank for all"),
        ("flora", {"ranks": (1, 2)}, r"ranks=\(1, 2\) is not usable: give a largest rank of 3"),
        ("flora", {"ranks": (0, 3)}, "integers >= 1"),
        ("ilora", {"rank": 6}, r"rank=6 is too large for layers/kernel \(2, 6, 5\): give at most 5"),
        ("hetlora", {"gamma": 1.0}, "gamma=1.0"),
        ("hetlora", {"min_rank": 4}, "min_rank=4"),
        ("lora_fair", {"solver": "svd"}, "solver='svd'"),
        ("lora_fair", {"lam": 0.0}, "lam=0.0"),
        ("rolora", {"b_ratio": 0.0}, "b_ratio=0.0"),
        ("lora_a2", {"local_rank": 3}, "local_rank=3"),
        ("dual_adapter", {"lam": -1.0}, "lam=-1.0"),
    ],
)
def test_unusable_options_are_named(method, options, message):
    with pytest.raises(ValueError, match=message):
        setup(method, **options)


def test_dual_adapter_needs_a_step_for_each_half():
    machine, _, state = setup("dual_adapter", steps=1)
    with pytest.raises(ValueError, match="local_steps=1 is not usable: give 2 or more"):
        machine.wire(state, plan(range(1), steps=1))


def test_a_client_below_hetloras_least_rank_stays_there():
    """A client that begins below the least rank stays there."""
    machine, rounds, state = setup("hetlora", ranks=(3, 1), min_rank=2, gamma=0.5, lam=10.0)
    before = np.asarray(state.clients["rank"])
    for t in range(4):
        state, _ = rounds(state, machine.train, plan(range(t, t + 1)), 1)
        after = np.asarray(state.clients["rank"])
        assert (after <= before).all() and (after[before == 1] == 1).all()
