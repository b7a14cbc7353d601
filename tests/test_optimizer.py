"""The client's AdamW against optax's, and its separate counters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedgalore_jax.optimizer import (
    WarmAdamState,
    adam_state,
    adamw_tail,
    scale_by_warm_adam,
    with_state,
)

PARAMS = {"kernel": jnp.linspace(-1, 1, 12).reshape(4, 3), "bias": jnp.array([0.5, -1.0, 2.0])}


def gradient(step):
    return jax.tree.map(lambda p: jnp.cos(p * (step + 1)), PARAMS)


def run(tx, params, steps, **extra):
    state = tx.init(params)
    for step in range(steps):
        updates, state = tx.update(gradient(step), state, params, **{k: step for k in extra})
        params = optax.apply_updates(params, updates)
    return params


def test_fresh_equals_optax_adamw():
    ours = optax.chain(scale_by_warm_adam(0.8, 0.95, 1e-5), adamw_tail(0.1, 0.3))
    theirs = optax.adamw(0.1, 0.8, 0.95, 1e-5, weight_decay=0.3, mask={"kernel": True, "bias": False})
    got, want = run(ours, PARAMS, 5, step=True), run(theirs, PARAMS, 5)
    for name in PARAMS:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-6, atol=1e-7)


def test_schedule_reads_the_global_step():
    schedule = optax.linear_schedule(1.0, 0.0, 10)
    tail = adamw_tail(schedule, 0.0)
    updates, _ = tail.update(PARAMS, tail.init(PARAMS), PARAMS, step=jnp.int32(4))
    np.testing.assert_allclose(updates["bias"], -0.6 * PARAMS["bias"], rtol=1e-6)


def test_each_moment_is_corrected_by_its_own_count():
    tx = scale_by_warm_adam(0.9, 0.99, 1e-6)
    g, nu = np.array([0.3, -2.0]), np.array([0.5, 4.0])
    warm = WarmAdamState(jnp.int32(0), jnp.int32(7), jnp.zeros(2), jnp.asarray(nu, jnp.float32))
    updates, state = tx.update(jnp.asarray(g, jnp.float32), warm)
    v = (0.99 * nu + 0.01 * g**2) / (1 - 0.99**8)
    np.testing.assert_allclose(updates, g / (np.sqrt(v) + 1e-6), rtol=1e-5)
    assert (int(state.count_m), int(state.count_v)) == (1, 8)


def test_learning_rate_ratio_by_path():
    tail = adamw_tail(1.0, 0.0, [("bi", 0.25), (".*", 1.0)])
    updates, _ = tail.update(PARAMS, tail.init(PARAMS), PARAMS, step=0)
    np.testing.assert_array_equal(updates["bias"], -0.25 * PARAMS["bias"])
    np.testing.assert_array_equal(updates["kernel"], -PARAMS["kernel"])


def test_adam_state_is_found_and_exchanged_in_a_chain():
    tx = optax.chain(optax.clip(1.0), optax.chain(scale_by_warm_adam(), optax.scale(1.0)))
    opt = tx.init(PARAMS)
    other = adam_state(opt)._replace(count_v=jnp.int32(5))
    assert adam_state(with_state(opt, other)) is other
    with pytest.raises(ValueError):
        adam_state(optax.adam(1.0).init(PARAMS))
