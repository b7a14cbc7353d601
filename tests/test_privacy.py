"""What hides a client: bounded changes, noise, what it costs, and the methods that it does not cover."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problem import N, absent, params, plan, setup

from fedgalore_jax import aggregators, blocks, defences, hosts, privacy
from fedgalore_jax.config import Config


def hidden(state):
    return state._replace(noise=hosts.secret_key())


def test_private_means_are_of_clipped_changes_and_carry_the_noise():
    """The noise has the size asked for, and everyone counts the same, absent or not."""
    machine, plain, state = setup("fedavg")
    clip, others = 0.05, [0, 1, 3, 4]
    faint, loud = (
        machine._replace(aggregator=aggregators.Aggregator(clip=clip, noise=noise)).rounds()
        for noise in (1e-6, 30.0)
    )

    def change(rounds, *missing, seed=0):
        begin = state._replace(noise=jax.random.key(seed))
        after, _ = rounds(begin, machine.train, absent(plan(range(1)), *missing), 1)
        moved = jax.tree.map(jnp.subtract, after.server.trainable, state.server.trainable)
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(moved)])

    alone = [change(plain, *(set(range(N)) - {c})) for c in others]
    want = sum(x * min(1, clip / np.linalg.norm(x)) for x in alone) / N
    np.testing.assert_allclose(change(faint, 2), want, atol=1e-6)
    noise = np.concatenate([change(loud, 2, seed=seed) - want for seed in range(4)])
    assert abs(noise.std() / (30 * clip / N) - 1) < 0.15 and abs(noise.mean()) < 0.1


@pytest.mark.parametrize(
    ("method", "options", "names"),
    [
        ("scaffold", {}, "a sum"),
        ("fedgalore", {}, "mu, nu, stacked rows"),
        ("fedgalore", {"sync": "none", "basis": "own"}, "factors of changes"),
        ("fedavg", {"moments": "mean"}, "mu, nu"),
    ],
)
def test_privacy_of_what_the_bound_does_not_cover_is_refused(method, options, names):
    machine, _, state = setup(method, **options)
    machine = machine._replace(aggregator=aggregators.Aggregator(clip=1.0, noise=1.0))
    with pytest.raises(ValueError, match=f"this one sends {names} besides: give another --method"):
        machine.program().lower(hidden(state), machine.train, plan(range(1)), 1)


def test_noise_does_not_follow_from_the_seed():
    """Two runs that share a seed would share it, and their difference would have none."""
    machine, _, _ = setup("fedavg")
    private = machine._replace(aggregator=aggregators.Aggregator(clip=1.0, noise=1.0))
    one, other = (blocks.start(Config(clients=N), private, params()) for _ in range(2))
    assert (jax.random.key_data(one.noise) != jax.random.key_data(other.noise)).any()
    assert (jax.random.key_data(one.key) == jax.random.key_data(other.key)).all()
    assert blocks.start(Config(clients=N), machine, params()).noise == ()


@pytest.mark.parametrize("method", ["rolora", "lora_a2"])
def test_noise_moves_the_factor_in_turn_alone(method):
    machine, _, state = setup(method)
    private = machine._replace(aggregator=aggregators.Aggregator(clip=0.1, noise=1.0)).rounds()
    after, _ = private(hidden(state), machine.train, plan(range(1)), 1)
    old, new = (s.server.trainable["layers/kernel"] for s in (state, after))
    np.testing.assert_array_equal(new.a, old.a)
    assert np.abs(new.b - old.b).max() > 1e-3


def test_privacy_of_models_of_clients_own_is_refused():
    config = Config(method="fedsa_lora", lr=1e-3, dp_clip=0.1, dp_noise=1.0)
    with pytest.raises(ValueError, match="fedsa_lora has a model per client, parts of which no noise covers"):
        defences.aggregator(config, setup("fedsa_lora")[0].strategy)


def test_privacy_and_decay_are_for_clients_with_weights_in_full():
    """Noise on how much factored clients' kernels decayed would scale the model."""
    private = aggregators.Aggregator(clip=1.0, noise=1e-6)
    options = {"sync": "none", "weight_decay": 0.1}
    machine, _, state = setup("fedgalore", **options)
    with pytest.raises(ValueError, match="give --weight_decay=0, or --client_weights=dense"):
        machine._replace(aggregator=private).program().lower(hidden(state), machine.train, plan(range(1)), 1)
    machine, _, state = setup("fedgalore", **options, client_weights="dense")
    machine._replace(aggregator=private).program().lower(hidden(state), machine.train, plan(range(1)), 1)


def test_epsilon_is_that_of_the_gaussian_mechanism():
    """Everyone in every round: composition has a closed form, which Rényi's is a little above."""
    pytest.importorskip("dp_accounting")
    from scipy.optimize import brentq
    from scipy.stats import norm

    from fedgalore_jax.privacy import guarantee

    promised = guarantee(rounds=9, clients=100, cohort=100, noise=30.0)
    mu = 2 * np.sqrt(9) / 30.0  # a client is replaced: twice the bound

    def delta(epsilon):
        high, low = (norm.cdf(s * mu / 2 - epsilon / mu) for s in (1, -1))
        return high - np.exp(epsilon) * low

    exact = brentq(lambda epsilon: delta(epsilon) - promised.delta, 1e-6, 10)
    assert promised.delta == 1e-5 and exact < promised.epsilon < 1.15 * exact
    fewer = guarantee(rounds=9, clients=100, cohort=5, noise=30.0)
    most = guarantee(rounds=9, clients=100, cohort=99, noise=30.0)
    assert fewer.epsilon < most.epsilon <= promised.epsilon and "draws 5 without replacement" in fewer.assumes


def test_leaves_of_one_shape_have_noise_of_their_own():
    noisy = aggregators.with_noise({"a": jnp.zeros(9), "b": jnp.zeros(9)}, jax.random.key(0), jnp.ones(()))
    assert np.abs(noisy["a"] - noisy["b"]).min() > 1e-3


def test_every_round_has_noise_of_its_own():
    """Nobody comes: what moves the model is noise, another in each round."""
    machine, _, state = setup("fedavg")
    rounds = machine._replace(aggregator=aggregators.Aggregator(clip=1.0, noise=1.0)).rounds()
    state, models = hidden(state), [state.server.trainable]
    for t in range(2):
        state, _ = rounds(state, machine.train, absent(plan(range(t, t + 1)), *range(N)), 1)
        models.append(state.server.trainable)
    first, second = (jax.tree.map(jnp.subtract, *models[t : t + 2][::-1]) for t in range(2))
    for a, b in zip(*map(jax.tree.leaves, (first, second)), strict=True):
        assert (np.abs(a) > 0).all() and np.abs(a - b).max() > 0.1


def test_the_promise_is_of_the_cohort():
    pytest.importorskip("dp_accounting")
    config = Config(rounds=3, clients=50, cohort=5, dp_clip=0.1, dp_noise=8.0)
    assert defences.guarantee(config) == privacy.guarantee(rounds=3, clients=50, cohort=5, noise=8.0)
