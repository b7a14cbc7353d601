"""Whole rounds against float64 NumPy, written down step by step."""

import jax.numpy as jnp
import numpy as np
import pytest
from problem import B, K, L, N, gradients, m, n, params, plan, samples, setup

from fedgalore_jax.optimizer import adam_state

pytestmark = pytest.mark.usefixtures("x64")

LR, CLIP, DECAY, B1, B2, EPS = 0.05, 0.7, 0.1, 0.9, 0.999, 1e-6
OPTIONS = {"clip": CLIP, "weight_decay": DECAY, "dtype": np.float64}


class Adam:
    """Clip by global norm, Adam, decoupled decay of what is named, one learning rate."""

    def __init__(self, shapes, nu=None, count=0):
        self.m = {k: np.zeros(s) for k, s in shapes.items()}
        self.v = nu or {k: np.zeros(s) for k, s in shapes.items()}
        self.t_m, self.t_v = 0, count

    def step(self, values, grads, decayed, lr=LR):
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        self.t_m, self.t_v = self.t_m + 1, self.t_v + 1
        for k, g in grads.items():
            g = g * min(1, CLIP / norm)
            self.m[k] = B1 * self.m[k] + (1 - B1) * g
            self.v[k] = B2 * self.v[k] + (1 - B2) * g**2
            m_hat = self.m[k] / (1 - B1**self.t_m)
            v_hat = self.v[k] / (1 - B2**self.t_v)
            decay = DECAY * values[k] if k in decayed else 0
            values[k] = values[k] - lr * (m_hat / (np.sqrt(v_hat) + EPS) + decay)


def start():
    p = params(jnp.float64)
    leaves = p["layers"]["kernel"], p["classifier"]["bias"], p["embeddings"]["shift"]
    return tuple(np.asarray(leaf) for leaf in leaves)


def client_batches(t):
    """`(p_i, [(x, y)] * K)` of each client of round t; a small client's padding is cut off."""
    data, rows = samples(np.float64), plan(range(t, t + 1))
    for c in range(N):
        keep = rows.weight[0, c] > 0
        batches = [rows.samples[0, c, k][keep] for k in range(K)]
        yield rows.counts[0, c] / rows.counts[0].sum(), [(data["x"][b], data["labels"][b]) for b in batches]


def run(method, count, **options):
    machine, rounds, state = setup(method, **OPTIONS, **options)
    state, _ = rounds(state, machine.train, plan(range(count)), count)
    out = machine.strategy.export(state.server)
    return np.asarray(out["layers"]["kernel"]), np.asarray(out["classifier"]["bias"]), state


def test_the_problem_has_a_small_client_and_real_clipping():
    sizes = [len(batches[0][0]) for _, batches in client_batches(0)]
    assert sizes == [B, B, B, B, 3]
    w, bias, shift = start()
    for _, batches in client_batches(0):
        dw, db = gradients(w, bias, shift, *batches[0])
        assert np.sqrt((dw**2).sum() + (db**2).sum()) > CLIP


def test_fedavg():
    w, bias, shift = start()
    for t in range(2):
        new_w, new_bias = np.zeros_like(w), np.zeros_like(bias)
        for p, batches in client_batches(t):
            values, adam = {"w": w, "b": bias}, Adam({"w": w.shape, "b": bias.shape})
            for x, y in batches:
                dw, db = gradients(values["w"], values["b"], shift, x, y)
                adam.step(values, {"w": dw, "b": db}, {"w"})
            new_w, new_bias = new_w + p * values["w"], new_bias + p * values["b"]
        w, bias = new_w, new_bias
    got_w, got_bias, _ = run("fedavg", 2)
    np.testing.assert_allclose(got_w, w, atol=1e-10)
    np.testing.assert_allclose(got_bias, bias, atol=1e-10)


def test_fedit_averages_the_factors_separately():
    _, _, state = setup("fedit", **OPTIONS)
    a, b = (np.asarray(x) for x in state.server.trainable["layers/kernel"])
    w, bias, shift = start()
    s = 2.0
    for t in range(2):
        mean = {"a": 0, "b": 0, "bias": 0}
        for p, batches in client_batches(t):
            values = {"a": a, "b": b, "bias": bias}
            adam = Adam({k: v.shape for k, v in values.items()})
            for x, y in batches:
                full = w + s * values["a"] @ values["b"]
                dw, db = gradients(full, values["bias"], shift, x, y)
                grads = {
                    "a": s * dw @ values["b"].swapaxes(1, 2),
                    "b": s * values["a"].swapaxes(1, 2) @ dw,
                    "bias": db,
                }
                adam.step(values, grads, {"a", "b"})
            mean = {k: mean[k] + p * values[k] for k in mean}
        a, b, bias = mean["a"], mean["b"], mean["bias"]
    got_w, got_bias, _ = run("fedit", 2)
    np.testing.assert_allclose(got_w, w + s * a @ b, atol=1e-10)
    np.testing.assert_allclose(got_bias, bias, atol=1e-10)


def test_fedgalore_with_own_bases():
    """Each client projects on the singular vectors of its first gradient; row means of nu go on."""
    options = {"basis": "own", "finder": "svd", "sync": "mean"}
    w, bias, shift = start()
    r, nu, count = 3, {"z": np.zeros((L, 3, n)), "b": np.zeros(n)}, 0
    for t in range(2):
        new_w, new_bias, new_nu = 0, 0, {"z": 0, "b": 0}
        for p, batches in client_batches(t):
            basis = np.linalg.svd(gradients(w, bias, shift, *batches[0])[0])[0][..., :r]
            full, values = w, {"z": np.zeros((L, r, n)), "b": bias}
            adam = Adam({k: v.shape for k, v in nu.items()}, {k: v.copy() for k, v in nu.items()}, count)
            for x, y in batches:
                dw, db = gradients(full, values["b"], shift, x, y)
                values["z"] = np.zeros((L, r, n))
                adam.step(values, {"z": basis.swapaxes(1, 2) @ dw, "b": db}, set())
                full = full + basis @ values["z"] - LR * DECAY * full
            new_w, new_bias = new_w + p * full, new_bias + p * values["b"]
            new_nu = {k: new_nu[k] + p * adam.v[k] for k in new_nu}
        rows = np.broadcast_to(new_nu["z"].mean(1, keepdims=True), (L, r, n))
        w, bias, nu, count = new_w, new_bias, {"z": rows, "b": new_nu["b"]}, count + K
    got_w, got_bias, _ = run("fedgalore", 2, **options)
    np.testing.assert_allclose(got_w, w, atol=1e-10)
    np.testing.assert_allclose(got_bias, bias, atol=1e-10)


@pytest.mark.parametrize("client_weights", ["factored", "dense"])
def test_fedgalore_carries_the_mean_second_moment(client_weights):
    options = {"sync": "mean", "sync_first": False, "refresh_rounds": 9}
    options |= {"client_weights": client_weights}
    _, _, state = setup("fedgalore", **OPTIONS, **options)
    basis = np.asarray(state.server.extra.basis["layers/kernel"])
    back = basis.swapaxes(1, 2)
    w, bias, shift = start()
    r = basis.shape[-1]
    shapes = {"z": (L, r, n), "b": (n,)}
    nu, count = {k: np.zeros(s) for k, s in shapes.items()}, 0
    for t in range(2):
        new_w, new_bias, new_nu = 0, 0, {"z": 0, "b": 0}
        for p, batches in client_batches(t):
            # GaLore as its authors write it: on the full weight, the step lifted from the subspace.
            full, values = w, {"z": np.zeros((L, r, n)), "b": bias}
            adam = Adam(shapes, {k: v.copy() for k, v in nu.items()}, count)
            for x, y in batches:
                dw, db = gradients(full, values["b"], shift, x, y)
                values["z"] = np.zeros((L, r, n))
                adam.step(values, {"z": back @ dw, "b": db}, set())
                full = full + basis @ values["z"] - LR * DECAY * full
            new_w, new_bias = new_w + p * full, new_bias + p * values["b"]
            new_nu = {k: new_nu[k] + p * adam.v[k] for k in new_nu}
        w, bias, nu, count = new_w, new_bias, new_nu, count + K
    got_w, got_bias, state = run("fedgalore", 2, **options)
    np.testing.assert_allclose(got_w, w, atol=1e-10)
    np.testing.assert_allclose(got_bias, bias, atol=1e-10)
    np.testing.assert_allclose(state.server.extra.adam.nu["layers/kernel"], nu["z"], atol=1e-12)
    assert int(state.server.extra.adam.count_v) == 2 * K
    assert basis.shape == (L, m, 3)
    assert adam_state(state.server.extra.adam).count_m == 0
