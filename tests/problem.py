"""A federated problem small enough to be computed by hand: stacked linear layers, a bias, squared error.

prediction = sum_l x @ W_l + shift + bias        W [L, m, n] adapted, bias [n] trained, shift frozen
"""

import jax
import jax.numpy as jnp
import numpy as np

from fedgalore_jax import engine
from fedgalore_jax.adapters import matmuls
from fedgalore_jax.data import FederatedData
from fedgalore_jax.strategies import build

L, m, n = 2, 6, 5
SIZES = (7, 12, 5, 9, 3)
"""Samples of each client; the last one has fewer than a batch."""
N, K, B = len(SIZES), 3, 4
ROLES = (("classifier/", "train"), ("layers/.*kernel", "adapt"), (".*", "freeze"))
OPTIONS = {"lr": 0.05, "rank": 3, "roles": ROLES}


def params(dtype=jnp.float32):
    rng = np.random.default_rng(1)
    return {
        "layers": {"kernel": jnp.asarray(rng.normal(size=(L, m, n)), dtype)},
        "classifier": {"bias": jnp.asarray(rng.normal(size=n), dtype)},
        "embeddings": {"shift": jnp.asarray(rng.normal(size=n), dtype)},
    }


def samples(dtype=np.float32):
    """Every client has targets of its own: the federation is not iid."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(sum(SIZES), m))
    truth = rng.normal(size=(N, m, n)) + 2 * rng.normal(size=(m, n))
    y = np.concatenate([part @ w for part, w in zip(np.split(x, np.cumsum(SIZES)[:-1]), truth, strict=True)])
    return {"x": x.astype(dtype), "labels": y.astype(dtype)}


def federation(seed=3):
    return FederatedData(np.split(np.arange(sum(SIZES)), np.cumsum(SIZES)[:-1]), seed)


def apply(params, inputs, *, key=None):
    kernel, x = params["layers"]["kernel"], inputs["x"]
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], kernel) for i in range(L)]
    out = sum(matmuls(x, layers))
    bias = params["classifier"]["bias"] + params["embeddings"]["shift"]
    return out + bias[None]


def loss(params, batch, key):
    del key
    error = jnp.square(apply(params, batch) - batch["labels"]).sum(-1) / 2
    return (error * batch["weight"]).sum() / jnp.maximum(batch["weight"].sum(), 1)


def gradients(w, bias, shift, x, y):
    """Of `loss`, by hand, for one batch without padding: dW (the same for every layer) and dbias."""
    residual = x @ w.sum(0) + bias + shift - y
    return np.broadcast_to(x.T @ residual / len(x), w.shape), residual.mean(0)


def setup(method, *, dtype=np.float32, chunk=N, steps=K, **options):
    """An engine, its compiled rounds and the first state."""
    strategy = build(method, **(OPTIONS | options))
    train = {name: jnp.asarray(x) for name, x in samples(dtype).items()}
    machine = engine.Engine(strategy, loss, train, N, steps, chunk)
    state = engine.init(strategy, params(dtype), jax.random.key(0), N)
    return machine, machine.rounds(), state


def plan(rounds, cohort=N, chunk=1, steps=K):
    return federation().plan(rounds, cohort, steps, B, chunk)


def away(plan, client, *rounds):
    """The plan where a client is not in the cohort of some rounds: its place is empty."""
    ids, counts = plan.ids.copy(), plan.counts.copy()
    for t in rounds:
        ids[t, plan.ids[t] == client], counts[t, plan.ids[t] == client] = N, 0
    return plan._replace(ids=ids, counts=counts)


def absent(plan, *clients):
    """The plan where some clients are sent each round, and send nothing."""
    return plan._replace(counts=np.where(np.isin(plan.ids, clients), 0, plan.counts))


def train_rounds(method, count=2, *, chunk=N, cohort=N, **options):
    """Runs `count` rounds; returns the exported parameters, the state and the metrics."""
    machine, rounds, state = setup(method, chunk=chunk, **options)
    state, metrics = rounds(state, machine.train, plan(range(count), cohort, chunk), count)
    return machine.strategy.export(state.server), state, metrics


def assert_close(a, b, atol):
    for (path, x), (_, y) in zip(jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b), strict=True):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        x, y = np.asarray(x), np.asarray(y)
        assert x.shape == y.shape and x.dtype == y.dtype, jax.tree_util.keystr(path)
        np.testing.assert_allclose(x, y, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))
