"""Methods in gradient subspaces against float64 NumPy, two rounds each."""

import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import CLIP, DECAY, LR, OPTIONS, Adam, R, T, assert_model, client_batches, run, start
from problem import K, L, N, gradients, m, n, setup

pytestmark = pytest.mark.usefixtures("x64")


def galore(w, bias, batches, basis):
    """A round of GaLore-AdamW on the full weight, in one basis, from fresh moments."""
    values, adam = {"z": np.zeros((L, R, n)), "b": bias}, Adam({"z": (L, R, n), "b": (n,)})
    for x, y in batches:
        dw, db = gradients(w, values["b"], start()[2], x, y)
        values["z"] = np.zeros((L, R, n))
        adam.step(values, {"z": T(basis) @ dw, "b": db}, set())
        w = w + basis @ values["z"] - LR * DECAY * w
    return w, values["b"]


@pytest.mark.parametrize("client_weights", ["factored", "dense"])
def test_galore_avg_averages_weights_from_own_subspaces(client_weights):
    w, bias, shift = start()
    for t in range(2):
        rows = []
        for p, batches in client_batches(t):
            basis = np.linalg.svd(gradients(w, bias, shift, *batches[0])[0])[0][..., :R]
            rows.append((p, *galore(w, bias, batches, basis)))
        w, bias = sum(p * x for p, x, _ in rows), sum(p * x for p, _, x in rows)
    assert_model(run("galore_avg", 2, finder="svd", client_weights=client_weights), w, bias)


def test_fedlore_has_one_new_basis_a_round():
    w, bias, _ = start()
    _, _, state = setup("fedlore", **OPTIONS)
    bases = [np.asarray(state.server.extra.basis["layers/kernel"])]
    bases.append(np.asarray(run("fedlore", 1)[2].server.extra.basis["layers/kernel"]))
    for t, basis in enumerate(bases):
        rows = [(p, *galore(w, bias, batches, basis)) for p, batches in client_batches(t)]
        w, bias = sum(p * x for p, x, _ in rows), sum(p * x for p, _, x in rows)
    assert_model(run("fedlore", 2), w, bias)
    assert np.abs(bases[0] - bases[1]).max() > 0.1


def test_fedslop_is_momentum_in_a_shared_random_subspace():
    mu = 0.6
    w, bias, shift = start()
    machine, _, state = setup("fedslop", momentum=mu, **OPTIONS)
    for t in range(2):
        server = state.server._replace(round=jnp.int32(t))
        basis = np.asarray(machine.strategy.broadcast(server).extra["bases"]["layers/kernel"])
        np.testing.assert_allclose(T(basis) @ basis, np.broadcast_to(np.eye(R), (L, R, R)), atol=1e-12)
        new_w, new_bias = 0, 0
        for p, batches in client_batches(t):
            x_w, x_b, u, v = w, bias, np.zeros((L, m, n)), np.zeros(n)
            for x, y in batches:
                dw, db = gradients(x_w, x_b, shift, x, y)
                dw = basis @ T(basis) @ dw
                share = min(1, CLIP / np.sqrt((dw**2).sum() + (db**2).sum()))
                u, v = mu * u + share * dw, mu * v + share * db
                x_w, x_b = x_w - LR * (u + DECAY * x_w), x_b - LR * v
            new_w, new_bias = new_w + p * x_w, new_bias + p * x_b
        w, bias = new_w, new_bias
    assert_model(run("fedslop", 2, momentum=mu), w, bias)


def test_ssf_is_scaffold_in_the_subspace_and_backfills():
    """For plain SGD the new coefficients are option II's: P'c_i - P'c - z / (K eta)."""
    w, bias, shift = start()
    options = {"clip": 0.0, "weight_decay": 0.0}
    machine, _, state = setup("ssf", **(OPTIONS | options))
    c, c_b = np.zeros_like(w), np.zeros_like(bias)
    own = [(c, c_b)] * N
    for t in range(3):
        server = state.server._replace(round=jnp.int32(t))
        basis = np.asarray(machine.strategy.broadcast(server).extra["bases"]["layers/kernel"])
        back, rows, moved, moved_b = T(basis), [], 0, 0
        for i, (p, batches) in enumerate(client_batches(t)):
            z, b, (c_i, c_ib) = np.zeros((L, R, n)), bias, own[i]
            for x, y in batches:
                dw, db = gradients(w + basis @ z, b, shift, x, y)
                z = z - LR * (back @ dw - back @ c_i + back @ c)
                b = b - LR * (db - c_ib + c_b)
            new, new_b = back @ c_i - back @ c - z / (K * LR), c_ib - c_b - (b - bias) / (K * LR)
            filled = c_i - basis @ back @ c_i + basis @ new
            moved, moved_b = moved + p * (filled - c_i), moved_b + p * (new_b - c_ib)
            own[i] = filled, new_b
            rows.append((p, z, b))
        w, bias = w + basis @ sum(p * z for p, z, _ in rows), sum(p * b for p, _, b in rows)
        c, c_b = c + moved, c_b + moved_b
    got = run("ssf", 3, **options)
    assert_model(got, w, bias)
    np.testing.assert_allclose(got[2].server.extra["variate"]["layers/kernel"], c, atol=1e-9)
    np.testing.assert_allclose(got[2].clients["layers/kernel"][2], own[2][0], atol=1e-9)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("fedlore", {"basis": "own"}, "basis='own'"),
        ("fedslop", {"momentum": 1.0}, "momentum=1.0"),
        (
            "fedslop",
            {"rank": 6},
            "rank=6 is no subspace of the left side of layers/kernel",
        ),
        ("ssf", {"weight_decay": 0.1}, "weight_decay=0.1"),
        ("ssf", {"rank": 6}, "rank=6 is no subspace of the left side of layers/kernel"),
        ("galore_avg", {"finder": "qr"}, "finder='qr'"),
    ],
)
def test_unusable_options_are_named(method, options, message):
    with pytest.raises(ValueError, match=message):
        setup(method, **options)
