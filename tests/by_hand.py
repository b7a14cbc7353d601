"""A client's local training in float64 NumPy, on the problem of `problem.py`."""

import jax.numpy as jnp
import numpy as np
from problem import K, L, N, gradients, m, n, params, plan, samples, setup

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
    machine, rounds, state = setup(method, **(OPTIONS | options))
    state, _ = rounds(state, machine.train, plan(range(count)), count)
    out = machine.strategy.export(state.server)
    return np.asarray(out["layers"]["kernel"]), np.asarray(out["classifier"]["bias"]), state


# The trained leaves as one vector: full-weight methods are written down as in their papers.
DECAYED = np.concatenate([np.ones(L * m * n), np.zeros(n)])


def pack(w, bias):
    return np.concatenate([w.ravel(), bias])


def unpack(theta):
    return theta[:-n].reshape(L, m, n), theta[-n:]


def gradient(theta, batch):
    return pack(*gradients(*unpack(theta), start()[2], *batch))


def clipped(g):
    return g * min(1, CLIP / np.linalg.norm(g))


def sgd(theta, g):
    """One step of SGD as the clients take it: clipped, with decoupled decay."""
    return theta - LR * (clipped(g) + DECAY * DECAYED * theta)


class AdamVector:
    """Adam's direction for a vector; counts as `WarmAdamState` has them."""

    def __init__(self, v=0.0, count=0, corrected=True):
        self.m, self.v, self.t_m, self.t_v, self.corrected = 0.0, v, 0, count, corrected

    def __call__(self, g):
        g, self.t_m, self.t_v = clipped(g), self.t_m + 1, self.t_v + 1
        self.m = B1 * self.m + (1 - B1) * g
        self.v = B2 * self.v + (1 - B2) * g**2
        by_m, by_v = (1 - B1**self.t_m, 1 - B2**self.t_v) if self.corrected else (1, 1)
        return self.m / by_m / (np.sqrt(self.v / by_v) + EPS)


def adamw(theta, direction):
    return theta - LR * (direction + DECAY * DECAYED * theta)


def assert_round(method, count, theta, **options):
    """The library's rounds end at `theta`; returns the state."""
    w, bias, state = run(method, count, **options)
    np.testing.assert_allclose(pack(w, bias), theta, atol=1e-10)
    return state


S, R = 2.0, 3
"""LoRA's scale and rank in `problem.OPTIONS`."""


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


def assert_model(got, w, bias):
    np.testing.assert_allclose(got[0], w, atol=1e-9)
    np.testing.assert_allclose(got[1], bias, atol=1e-9)
