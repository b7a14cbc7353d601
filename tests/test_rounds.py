"""Whole rounds against float64 NumPy, written down step by step."""

import numpy as np
import pytest
from by_hand import CLIP, DECAY, LR, OPTIONS, Adam, client_batches, run, start
from problem import B, K, L, gradients, m, n, setup

from fedgalore_jax.optimizer import adam_state

pytestmark = pytest.mark.usefixtures("x64")


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
