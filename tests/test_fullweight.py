"""Full-weight methods against float64 NumPy, two or three rounds each, as their papers write them."""

import numpy as np
import pytest
from by_hand import (
    CLIP,
    DECAY,
    LR,
    AdamVector,
    adamw,
    assert_round,
    client_batches,
    gradient,
    pack,
    run,
    sgd,
    start,
    unpack,
)
from problem import SIZES, K, N, plan, setup

from fedgalore_jax import aggregators
from fedgalore_jax.corrections import zero_mean

pytestmark = pytest.mark.usefixtures("x64")


def flat(tree):
    return pack(np.asarray(tree["layers/kernel"]), np.asarray(tree["classifier/bias"]))


def first():
    return pack(*start()[:2])


def federate(theta, t, train):
    """The p-weighted mean of what clients return; `train(client, batches) -> array`."""
    return sum(p * train(c, batches) for c, (p, batches) in enumerate(client_batches(t)))


def test_fedprox_pulls_through_adam():
    theta, mu = first(), 0.5
    for t in range(2):

        def train(_, batches, theta=theta):
            w, adam = theta, AdamVector()
            for batch in batches:
                w = adamw(w, adam(gradient(w, batch) + mu * (w - theta)))
            return w

        theta = federate(theta, t, train)
    assert_round("fedprox", 2, theta, mu=mu)


@pytest.mark.parametrize("mean", ["per_unit", "per_tensor"])
def test_fedzmg_centres_the_gradient(mean):
    theta = first()

    def centred(g):
        dw, db = unpack(g)
        if mean == "per_unit":
            return pack(dw - dw.mean(1, keepdims=True), db)
        return pack(dw - dw.mean((1, 2), keepdims=True), db - db.mean())

    def train(_, batches):
        w = theta
        for batch in batches:
            w = sgd(w, centred(gradient(w, batch)))
        return w

    assert_round("fedzmg", 1, federate(theta, 0, train), mean=mean)


def test_the_mean_of_a_whole_tensor_is_over_all_of_it():
    """An embedding's too, whose rows are no layers."""
    grads = {
        "embeddings/words": np.arange(6.0).reshape(2, 3),
        "layers/kernel": np.arange(8.0).reshape(2, 2, 2),
    }
    got, _ = zero_mean("per_tensor").update(grads, (), None)
    np.testing.assert_allclose(got["embeddings/words"], grads["embeddings/words"] - 2.5)
    np.testing.assert_allclose(got["layers/kernel"].mean((1, 2)), 0)
    unit, _ = zero_mean("per_unit").update(grads, (), None)
    np.testing.assert_array_equal(unit["embeddings/words"], grads["embeddings/words"])


def trained_by_sgd(theta, batches):
    w = theta
    for batch in batches:
        w = sgd(w, gradient(w, batch))
    return w


@pytest.mark.parametrize("server", ["avgm", "adam", "yogi", "adagrad"])
def test_fedopt_has_no_bias_correction(server):
    theta, tau = first(), 1e-3
    lr = 1.0 if server == "avgm" else 0.01
    b1, b2 = 0.0 if server == "adagrad" else 0.9, 0.99
    m, v = 0 * theta, np.full_like(theta, tau**2)
    for t in range(3):
        d = federate(theta, t, lambda _, batches, w=theta: trained_by_sgd(w, batches)) - theta
        if server == "avgm":
            m = b1 * m + d
            theta = theta + lr * m
            continue
        m = b1 * m + (1 - b1) * d
        v = {
            "adam": b2 * v + (1 - b2) * d**2,
            "yogi": v - (1 - b2) * d**2 * np.sign(v - d**2),
            "adagrad": v + d**2,
        }[server]
        theta = theta + lr * m / (np.sqrt(v) + tau)
    assert_round("fedopt", 3, theta, server=server)


def test_scaffold_with_plain_sgd_is_option_two():
    """c_i - c + (w_t - w_K) / (K eta): the same numbers as the mean raw gradient, where nothing else acts."""
    theta = first()
    c, own = 0 * theta, [0 * theta] * N
    for t in range(3):
        mean, moved = 0, 0
        for i, (p, batches) in enumerate(client_batches(t)):
            w = theta
            for batch in batches:
                w = w - LR * (gradient(w, batch) - own[i] + c)
            new = own[i] - c + (theta - w) / (K * LR)
            mean, moved, own[i] = mean + p * w, moved + p * (new - own[i]), new
        theta, c = mean, c + moved
    state = assert_round("scaffold", 3, theta, clip=0.0, weight_decay=0.0)
    np.testing.assert_allclose(flat(state.server.extra), c, atol=1e-10)
    got = {path: rows[2] for path, rows in state.clients.items()}
    np.testing.assert_allclose(flat(got), own[2], atol=1e-10)


def test_scaffold_with_adamw_keeps_raw_gradients():
    """Neither clipping, decay nor Adam's scaling reaches the control variates."""
    theta = first()
    c, own = 0 * theta, [0 * theta] * N
    for t in range(2):
        mean, moved = 0, 0
        for i, (p, batches) in enumerate(client_batches(t)):
            w, adam, raw = theta, AdamVector(), 0
            for batch in batches:
                g = gradient(w, batch)
                raw, w = raw + g / K, adamw(w, adam(g - own[i] + c))
            mean, moved, own[i] = mean + p * w, moved + p * (raw - own[i]), raw
        theta, c = mean, c + moved
    state = assert_round("scaffold", 2, theta, client="adamw")
    np.testing.assert_allclose(flat(state.server.extra), c, atol=1e-10)
    displacement = (first() - theta) / (2 * K * LR)
    assert np.abs(flat(state.server.extra) - displacement).max() > 0.5


def test_feddyn_in_the_papers_signs():
    """h_i <- h_i - lam (w_i - w_t) and w = mean w_i - h / lam, as 2111.04263 writes it."""
    theta, lam = first(), 0.3
    h, own = 0 * theta, [0 * theta] * N
    for t in range(3):
        mean, total = 0, 0
        for i, (p, batches) in enumerate(client_batches(t)):
            w = theta
            for batch in batches:
                w = sgd(w, gradient(w, batch) - own[i] + lam * (w - theta))
            own[i] = own[i] - lam * (w - theta)
            mean, total = mean + p * w, total + p * (w - theta)
        h = h - lam * total
        theta = mean - h / lam
    assert_round("feddyn", 3, theta, lam=lam)


def test_fedsmoo_perturbs_towards_a_consensus():
    theta, lam, rho = first(), 0.2, 0.3
    s, h = 0 * theta, 0 * theta
    own, duals = [0 * theta] * N, [0 * theta] * N
    for t in range(3):
        mean = 0
        for i, (p, batches) in enumerate(client_batches(t)):
            w = theta
            for batch in batches:
                away = gradient(w, batch) - duals[i] - s
                e = rho * away / np.linalg.norm(away)
                duals[i] = duals[i] + e - s
                w = sgd(w, gradient(w + e, batch) + lam * (w - theta + own[i]))
            own[i] = own[i] + w - theta
            mean, h = mean + p * w, h + p * (w - theta)
        theta = mean + h
        s = sum(p * dual for (p, _), dual in zip(client_batches(t), duals, strict=True))
        s = rho * s / np.linalg.norm(s)
    state = assert_round("fedsmoo", 3, theta, lam=lam, rho=rho)
    np.testing.assert_allclose(flat(state.server.extra["consensus"]), s, atol=1e-10)


@pytest.mark.parametrize("method", ["scaffold", "feddyn", "fedsmoo", "ssf"])
def test_what_corrects_clients_is_the_mean_of_their_memories(method):
    """By sample counts, whoever took part: these methods' optimum is then that of the others."""
    machine, rounds, state = setup(method, dtype=np.float64, chunk=2)
    state, _ = rounds(state, machine.train, plan(range(4), cohort=2), 4)
    extra, memory = state.server.extra, state.clients
    ours = {"scaffold": extra, "ssf": extra.get("variate")}.get(method, extra.get("h"))
    for path, rows in memory.get("h", memory).items():
        mean = np.tensordot(np.array(SIZES) / sum(SIZES), rows, 1)
        assert np.abs(mean).max() > 1e-3
        np.testing.assert_allclose(ours[path], mean, atol=1e-12)


@pytest.mark.parametrize("name", ["median", "trimmed_mean", "norm_clip"])
def test_clients_of_any_size_count_alike_where_entries_are_compared(name):
    """The same samples five times over: c is everyone's c_i, however large each is."""
    machine, _, state = setup("scaffold", dtype=np.float64, clip=0.0)
    alike = plan(range(3))
    first = np.broadcast_to(alike.samples[:, :1], alike.samples.shape)
    weight = np.ones_like(alike.weight)
    alike = alike._replace(samples=first, weight=weight, counts=np.tile([20, 4, 4, 4, 4], (3, 1)))
    machine = machine._replace(aggregator=aggregators.build(name))
    after, _ = machine.rounds()(state, machine.train, alike, 3)
    for path, rows in after.clients.items():
        np.testing.assert_allclose(after.server.extra[path], rows[0], atol=1e-12)


def test_fedlada_mixes_in_the_last_change():
    theta, gamma = first(), 0.6
    v, last = 0 * theta, 0 * theta
    for t in range(3):
        mean, new = 0, 0
        for p, batches in client_batches(t):
            w, adam = theta, AdamVector(v, corrected=False)
            for batch in batches:
                w = adamw(w, (1 - gamma) * adam(gradient(w, batch))) + gamma / K * last
            mean, new = mean + p * w, new + p * adam.v
        theta, v, last = mean, new, mean - theta
    assert_round("fedlada", 3, theta, gamma=gamma)


@pytest.mark.parametrize("block", ["neuron", "tensor"])
def test_fedadamw_shares_block_means(block):
    theta, alpha = first(), 0.5
    v, last = 0 * theta, 0 * theta
    axis = 1 if block == "neuron" else (1, 2)
    for t in range(3):
        mean, new = 0, 0
        for p, batches in client_batches(t):
            w, adam = theta, AdamVector(v, t * K)
            for batch in batches:
                w = adamw(w, adam(gradient(w, batch))) + alpha / K * last
            mean, new = mean + p * w, new + p * adam.v
        of_w, of_b = unpack(new)
        v = pack(of_w * 0 + of_w.mean(axis, keepdims=True), of_b * 0 + of_b.mean())
        theta, last = mean, mean - theta
    assert_round("fedadamw", 3, theta, alpha=alpha, block=block)


def storm(theta, batches, same_batch=True):
    w, before, v = theta, theta, 0
    for k, batch in enumerate(batches):
        g = gradient(w, batch)
        other = batch if same_batch else batches[max(k - 1, 0)]
        v = g if k == 0 else g + v - gradient(before, other)
        w, before = sgd(w, v), w
    return w


def test_fedglomo_runs_twice_on_the_same_batches():
    theta, beta = first(), 0.4
    before, u = theta, 0
    for t in range(3):
        d = federate(theta, t, lambda _, b, w=theta: storm(w, b)) - theta
        d_before = federate(before, t, lambda _, b, w=before: storm(w, b)) - before
        u = d if t == 0 else beta * d + (1 - beta) * (u + d - d_before)
        theta, before = theta + u, theta
    assert_round("fedglomo", 3, theta, beta=beta)


def test_storm_with_the_last_batch_would_be_another_method():
    """The trap: v then telescopes to the plain gradient, which is SGD; the library's is not."""
    batches = next(client_batches(0))[1]
    theta = first()
    telescoped = storm(theta, batches, same_batch=False)
    np.testing.assert_allclose(telescoped, trained_by_sgd(theta, batches), atol=1e-12)
    assert np.abs(telescoped - storm(theta, batches)).max() > 1e-3


def test_fedavg_with_sgd_clients():
    theta = first()
    for t in range(2):
        theta = federate(theta, t, lambda _, batches, w=theta: trained_by_sgd(w, batches))
    assert_round("fedavg", 2, theta, client="sgd")


def test_fedavg_keeps_moments_with_each_client():
    theta, memories = first(), [AdamVector() for _ in range(N)]
    for t in range(3):

        def train(i, batches, w=theta):
            for batch in batches:
                w = adamw(w, memories[i](gradient(w, batch)))
            return w

        theta = federate(theta, t, train)
    state = assert_round("fedavg", 3, theta, moments="keep")
    np.testing.assert_allclose(state.clients.count_v, 3 * K)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("fedavg", {"client": "sgd", "moments": "keep"}, "client='sgd'"),
        ("fedavg", {"ranks": (1, 3)}, "fedavg has one rank for all"),
        ("fedprox", {"mu": -1.0}, "mu=-1.0"),
        ("fedprox", {"client": "adam"}, "client='adam'"),
        ("fedopt", {"server": "sgd"}, "server='sgd'"),
        ("fedopt", {"tau": 0.0}, "tau=0.0"),
        ("fedopt", {"beta2": 1.0}, "beta2=1.0"),
        (
            "fedopt",
            {"server": "avgm", "tau": 1e-2},
            "tau=0.01 is not usable: give a server among adam, yogi, ad",
        ),
        (
            "fedopt",
            {"server": "adagrad", "beta2": 0.9},
            "beta2=0.9 is not usable: give a server among adam, yogi",
        ),
        ("feddyn", {"lam": 0.0}, "lam=0.0"),
        ("fedsmoo", {"rho": 0.0}, "rho=0.0"),
        ("fedlada", {"gamma": 1.0}, "gamma=1.0"),
        ("fedadamw", {"block": "head"}, "block='head'"),
        ("fedglomo", {"beta": 0.0}, "beta=0.0"),
        ("fedzmg", {"mean": "all"}, "mean='all'"),
    ],
)
def test_unusable_options_are_named(method, options, message):
    with pytest.raises(ValueError, match=message):
        setup(method, **options)


def test_decay_and_clipping_are_on():
    """The tests above would not see a missing clip or decay if they were too weak to matter."""
    w, _, _ = run("fedavg", 1, client="sgd")
    free, _, _ = run("fedavg", 1, client="sgd", weight_decay=0.0)
    loose, _, _ = run("fedavg", 1, client="sgd", clip=100 * CLIP)
    assert DECAY and np.abs(w - free).max() > 1e-3 and np.abs(w - loose).max() > 1e-3
