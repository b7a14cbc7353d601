"""What every strategy must do, whatever it is. The full matrix: `pytest -m slow`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problem import (
    OPTIONS,
    SIZES,
    K,
    L,
    N,
    absent,
    assert_close,
    away,
    federation,
    loss,
    m,
    n,
    params,
    plan,
    setup,
    train_rounds,
)

from fedgalore_jax import engine, strategies, tree

r, bias = 3, n
CASES = {
    "fedavg": ("fedavg", {}),
    "fedavg, mean moments": ("fedavg", {"moments": "mean"}),
    "fedit": ("fedit", {}),
    "fedavg, kept moments": ("fedavg", {"moments": "keep"}),
    "fedprox": ("fedprox", {}),
    "fedopt": ("fedopt", {"server_lr": 0.1}),
    "scaffold": ("scaffold", {"clip": 5.0}),
    "feddyn": ("feddyn", {}),
    "fedsmoo": ("fedsmoo", {}),
    "fedlada": ("fedlada", {"gamma": 0.5}),
    "fedadamw": ("fedadamw", {}),
    "fedglomo": ("fedglomo", {"clip": 5.0}),
    "fedzmg": ("fedzmg", {"clip": 5.0}),
    "ffa_lora": ("ffa_lora", {}),
    "rolora": ("rolora", {}),
    "lora_a2": ("lora_a2", {"local_rank": 1, "b_ratio": 1.0}),
    "fedsa_lora": ("fedsa_lora", {}),
    "dual_adapter": ("dual_adapter", {}),
    "flora": ("flora", {}),
    "flora, ranks": ("flora", {"ranks": (3, 1), "lora_alpha": 4.0}),
    "flexlora": ("flexlora", {}),
    "flexlora, ranks": ("flexlora", {"ranks": (3, 1), "lora_alpha": 4.0, "weight_decay": 0.1}),
    "hetlora": ("hetlora", {"ranks": (3, 2)}),
    "ilora": ("ilora", {}),
    "ilora, ranks": ("ilora", {"ranks": (3, 1), "variates": False}),
    "lora_fair": ("lora_fair", {}),
    "lora_fair, ls": ("lora_fair", {"solver": "ls"}),
    "fedex_lora": ("fedex_lora", {}),
    "fr_lora": ("fr_lora", {}),
    "galore_avg": ("galore_avg", {}),
    "fedlore": ("fedlore", {}),
    "fedslop": ("fedslop", {"clip": 5.0}),
    "ssf": ("ssf", {"clip": 5.0}),
    "adel_fl": ("adel_fl", {"speeds": (1.0, 2.0)}),
    "adel_fl, scaffold": ("adel_fl", {"base": "scaffold", "clip": 5.0, "speeds": (4.0, 1.0)}),
    "fedgalore": ("fedgalore", {}),
    "fedgalore, own": ("fedgalore", {"basis": "own"}),
    "fedgalore, decay": ("fedgalore", {"weight_decay": 0.3, "clip": 0.5}),
    "fedgalore, server mean": ("fedgalore", {"basis": "server", "sync": "mean", "refresh_rounds": 3}),
    "fedgalore, dense median": ("fedgalore", {"client_weights": "dense", "sync": "median"}),
    "fedgalore, none": ("fedgalore", {"sync": "none", "refresh_rounds": 1}),
}
CORE = ("fedavg", "scaffold", "fedit", "fedgalore", "fedgalore, own")
SEED = 8
FULL = L * m * n + bias
LORA = L * r * (m + n)
MOMENTS = 2 * (L * r * n + bias)
FLOATS = {
    # (down, up) per client and round, from the ledgers in the strategies' headers; SEED is in bytes.
    "fedavg": (FULL, FULL),
    "fedavg, mean moments": (3 * FULL, 3 * FULL),
    "fedavg, kept moments": (FULL, FULL),
    "fedprox": (FULL, FULL),
    "fedopt": (FULL, FULL),
    "scaffold": (2 * FULL, 2 * FULL),
    "feddyn": (FULL, FULL),
    "fedsmoo": (2 * FULL, 2 * FULL),
    "fedlada": (3 * FULL, 2 * FULL),
    "fedadamw": (2 * FULL + L * n + 1, FULL + L * n + 1),
    "fedglomo": (2 * FULL, 2 * FULL),
    "fedzmg": (FULL, FULL),
    "fedit": (LORA + bias, LORA + bias),
    "ffa_lora": (L * r * n + bias, L * r * n + bias),
    "rolora": (LORA / 2 + bias, LORA / 2 + bias),
    "lora_a2": (LORA / 2 + bias, LORA / r / 2 + bias + L),
    "fedsa_lora": (L * m * r, L * m * r),
    "dual_adapter": (LORA + bias, LORA + bias),
    "flora": (N * LORA + bias, LORA + bias),
    "flora, ranks": ((3 * LORA + 2 * LORA / 3) + bias, LORA * 2 / 3 + bias),
    "flexlora": (LORA + bias, LORA + bias),
    "flexlora, ranks": (LORA * 2 / 3 + bias, LORA * 2 / 3 + bias),
    "hetlora": (LORA * 5 / 6 + bias, LORA * 5 / 6 + bias + L + 1),
    "ilora": (2 * (LORA + bias), 2 * (LORA + bias)),
    "ilora, ranks": (LORA + bias, LORA * 2 / 3 + bias),
    "lora_fair": (LORA + bias, LORA + bias),
    "lora_fair, ls": (LORA + bias, LORA + bias),
    "fedex_lora": (N * LORA + bias, LORA + bias),
    "fr_lora": (LORA + bias, LORA + bias),
    "galore_avg": (FULL, LORA + bias),
    "fedlore": (L * r * n + bias + SEED / 4, L * r * n + bias),
    "fedslop": (FULL + SEED / 4, FULL),
    "ssf": (2 * (L * r * n + bias) + SEED / 4, 2 * (L * r * n + bias)),
    "adel_fl": (FULL, FULL),
    "adel_fl, scaffold": (2 * FULL, 2 * FULL),
    "fedgalore": (L * r * n + bias + MOMENTS + SEED / 4, L * r * n + bias + MOMENTS),
    "fedgalore, own": (
        L * m * n + bias + MOMENTS / 2,
        L * r * (m + n) + bias + MOMENTS / 2,
    ),
    # The factor of the frozen kernels is one float, with two moments like every trained leaf.
    "fedgalore, decay": (L * r * n + bias + MOMENTS + 3 + SEED / 4, L * r * n + bias + MOMENTS + 3),
    "fedgalore, server mean": (
        L * r * n + bias + MOMENTS + L * m * r / 3,
        L * r * n + bias + MOMENTS,
    ),
    "fedgalore, dense median": (
        L * m * n + bias + MOMENTS + SEED / 4,
        L * m * n + bias + MOMENTS,
    ),
    "fedgalore, none": (L * r * n + bias + SEED / 4, L * r * n + bias),
}
MEMORY = {
    # Floats that a client keeps between rounds; two counters go along with moments.
    "fedavg, kept moments": 2 * FULL + 2,
    "scaffold": FULL,
    "adel_fl, scaffold": FULL,
    "feddyn": FULL,
    "fedsmoo": 2 * FULL,
    "fedsa_lora": L * r * n + bias,
    "dual_adapter": LORA,
    "hetlora": 1,
    "ilora": LORA + bias,
    "ssf": FULL,
}
ADAPTERS = {"fedit", "ffa_lora", "rolora", "lora_a2", "lora_fair", "flexlora", "hetlora", "dual_adapter"}
"""Methods whose kernels never move."""
SHARES = {"scaffold", "adel_fl, scaffold", "feddyn", "fedsmoo", "ssf"}
"""Methods whose server keeps a mean over all clients, absent ones too, by sample counts."""
GRADIENTS = {"fedsmoo": 2, "fedglomo": 4, "lora_a2": 2}
"""Gradient evaluations per local step, where there is more than one."""

every = pytest.mark.parametrize(
    "case", [c if c in CORE else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)


def test_every_strategy_has_a_row():
    assert {method for method, _ in CASES.values()} == set(strategies.names())
    have = {name for name in strategies.names() if strategies.build(name, **OPTIONS).adapter is not None}
    assert have == ADAPTERS
    assert FLOATS.keys() == CASES.keys() > MEMORY.keys() | GRADIENTS.keys() | set(CORE)


@pytest.fixture(scope="module")
def built():
    """One engine and one compilation per case, shared by the tests that need no other."""
    made = {}

    def get(case):
        if case not in made:
            method, options = CASES[case]
            machine, rounds, state = setup(method, **options)
            made[case] = machine, rounds, state, plan(range(10))
        return made[case]

    return get


def exported(machine, state):
    """The model of the federation, or the first client's where each has its own."""
    strategy = machine.strategy
    if not strategy.personal:
        return strategy.export(state.server)
    return strategy.export(state.server, jax.tree.map(lambda rows: rows[0], state.clients))


@every
def test_ten_rounds_are_finite_and_the_loss_falls(built, case):
    machine, rounds, state, ten = built(case)
    state, metrics = rounds(state, machine.train, ten, 10)
    losses = np.asarray(metrics["train_loss"])
    assert np.isfinite(losses).all() and losses[-2:].mean() < 0.85 * losses[0]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(exported(machine, state)))


@every
def test_the_second_call_does_not_recompile(built, case):
    machine, rounds, state, ten = built(case)
    after, _ = rounds(state, machine.train, ten, 1)
    size = rounds.args[0]._cache_size()
    rounds(after, machine.train, ten, 3)
    assert rounds.args[0]._cache_size() == size


@every
def test_a_round_leaves_the_types_of_the_state_alone(built, case):
    machine, rounds, state, ten = built(case)
    after, _ = rounds(state, machine.train, ten, 1)
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
    assert [x.sharding for x in jax.tree.leaves(after)] == [x.sharding for x in jax.tree.leaves(state)]


@every
def test_one_call_of_two_rounds_equals_two_calls(built, case):
    machine, rounds, state, ten = built(case)
    together, _ = rounds(state, machine.train, ten, 2)
    first, _ = rounds(state, machine.train, ten, 1)
    later = jax.tree.map(lambda field: np.roll(field, -1, 0), ten)
    apart, _ = rounds(first, machine.train, later, 1)
    assert_close(together.server, apart.server, 1e-6)


@every
@pytest.mark.parametrize("chunk", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_chunks_agree(built, case, chunk):
    """Also the test of padded clients: two do not divide five, so one client is empty."""
    machine, rounds, state, ten = built(case)
    whole, whole_metrics = rounds(state, machine.train, ten, 2)
    method, options = CASES[case]
    _, chunked, metrics = train_rounds(method, 2, chunk=chunk, **options)
    assert_close(exported(machine, chunked), exported(machine, whole), 1e-5)
    assert jax.tree.structure(chunked) == jax.tree.structure(whole)
    np.testing.assert_allclose(metrics["train_loss"], whole_metrics["train_loss"][:2], rtol=1e-4)


@every
def test_the_order_of_clients_does_not_matter(built, case):
    machine, rounds, state, ten = built(case)
    order = np.array([3, 0, 4, 1, 2])
    mixed = jax.tree.map(lambda field: field[:, order], ten)
    assert_close(
        exported(machine, rounds(state, machine.train, ten, 2)[0]),
        exported(machine, rounds(state, machine.train, mixed, 2)[0]),
        1e-5,
    )


@every
def test_only_relative_weights_matter(built, case):
    machine, rounds, state, ten = built(case)
    want = exported(machine, rounds(state, machine.train, ten, 2)[0])
    if case in SHARES:  # of all samples: seven times as many there too
        machine = machine._replace(
            train={name: jnp.concatenate([x] * 7) for name, x in machine.train.items()}
        )
        rounds = machine.rounds()
    heavy = ten._replace(counts=ten.counts * 7)
    assert_close(want, exported(machine, rounds(state, machine.train, heavy, 2)[0]), 1e-5)


@every
def test_absent_clients_change_nothing(built, case):
    """An empty client is as good as none: its samples, however wild, reach nobody."""
    machine, rounds, state, ten = built(case)
    gone = ten._replace(counts=np.where(np.arange(N) == 2, 0, ten.counts))
    wild = machine.train | {"x": machine.train["x"].at[federation().parts[2]].set(1e6)}
    assert_close(
        rounds(state, machine.train, gone, 2)[0],
        rounds(state, wild, gone, 2)[0],
        1e-6,
    )


@every
def test_frozen_leaves_are_untouched_and_the_rest_moves(built, case):
    machine, rounds, state, ten = built(case)
    out = exported(machine, rounds(state, machine.train, ten, 1)[0])
    start = params()
    assert jax.tree.structure(out) == jax.tree.structure(start)
    np.testing.assert_array_equal(out["embeddings"]["shift"], start["embeddings"]["shift"])
    assert np.abs(out["layers"]["kernel"] - start["layers"]["kernel"]).max() > 1e-3
    assert np.abs(out["classifier"]["bias"] - start["classifier"]["bias"]).max() > 1e-3


@every
def test_bytes_on_the_wire_are_the_ledgers(built, case):
    machine, _, state, ten = built(case)
    wire = machine.wire(state, ten)
    assert (wire.down / 4, wire.up / 4) == FLOATS[case]
    assert wire.memory == 4 * MEMORY.get(case, 0)
    assert wire.gradients == pytest.approx(GRADIENTS.get(case, 1))


@pytest.mark.parametrize(
    "case",
    [
        c if c in CORE else pytest.param(c, marks=pytest.mark.slow)
        for c, (method, _) in CASES.items()
        if method in ADAPTERS
    ],
)
def test_an_adapter_is_all_that_kernels_learned(built, case):
    machine, rounds, state, ten = built(case)
    state, _ = rounds(state, machine.train, ten, 3)
    factors, lora_alpha = machine.strategy.adapter(state.server)
    start, out = tree.flatten(params()), tree.flatten(machine.strategy.export(state.server))
    assert factors.keys() == {"layers/kernel"}
    for path, (a, b) in factors.items():
        want = start[path] + lora_alpha / a.shape[-1] * a @ b
        np.testing.assert_allclose(out[path], want, atol=1e-5)
        assert np.abs(out[path] - start[path]).max() > 1e-2


@every
def test_runs_are_bit_identical(built, case):
    machine, rounds, state, ten = built(case)
    first, second = (rounds(state, machine.train, ten, 3)[0] for _ in range(2))
    assert_close(first, second, 0)


@pytest.mark.parametrize(
    "case",
    [c if c in CORE else pytest.param(c, marks=pytest.mark.slow) for c in MEMORY if c != "hetlora"],
)
def test_memories_of_absent_clients_stay(built, case):
    machine, rounds, state, ten = built(case)
    after, _ = rounds(state, machine.train, away(ten, 2, *range(len(ten.ids))), 1)
    old, new = (jax.tree.leaves((s.clients, s.last)) for s in (state, after))
    for before, now in zip(old, new, strict=True):
        np.testing.assert_array_equal(now[2], before[2])
    assert all((now[0] != before[0]).any() for before, now in zip(old, new, strict=True))
    assert after.last.tolist() == [0, 0, -1, 0, 0]


@pytest.mark.parametrize(
    "case", ["fedsmoo", *(pytest.param(c, marks=pytest.mark.slow) for c in ("fedgalore, own", "fedglomo"))]
)
def test_gradients_are_counted_as_they_run(case):
    """The count is taken while tracing; here the loss itself counts."""
    method, options = CASES[case]
    machine, _, state = setup(method, chunk=1, **options)
    seen = []

    def counting(params, batch, key):
        jax.debug.callback(lambda: seen.append(1))
        return loss(params, batch, key)

    machine = machine._replace(loss=counting)
    rows = plan(range(1), cohort=1)
    jax.block_until_ready(jax.jit(machine.round)(state, machine.train, jax.tree.map(lambda x: x[0], rows)))
    jax.effects_barrier()
    assert len(seen) == GRADIENTS.get(case, 1) * K == machine.wire(state, rows).gradients * K


def test_a_client_remembers_and_others_do_not():
    """The engine's rows of client memory: only clients of the cohort write, and only their own."""
    machine, _, _ = setup("fedavg", chunk=2)
    strategy = machine.strategy

    def finish(download, local, memory, ops):
        upload, _ = strategy.finish(download, local, (), ops)
        return upload, {"seen": memory["seen"] + 1, "id": ops.id}

    remembering = strategy._replace(
        client_init=lambda params, client: {"seen": jnp.int32(0), "id": -jnp.ones((), jnp.int32)},
        finish=finish,
    )
    machine = machine._replace(strategy=remembering)
    state = engine.init(remembering, params(), jax.random.key(0), N)
    rows = plan(range(2), cohort=3, chunk=2)
    state, _ = machine.rounds()(state, machine.train, rows, 2)
    chosen = [set(rows.ids[t].tolist()) - {N} for t in range(2)]
    want = [sum(client in c for c in chosen) for client in range(N)]
    assert state.clients["seen"].tolist() == want and 0 in want
    assert state.clients["id"].tolist() == [c if s else -1 for c, s in enumerate(want)]
    assert machine.wire(state, rows).memory == 8
    assert state.last.tolist() == [max([t for t in range(2) if c in chosen[t]], default=-1) for c in range(N)]


def test_one_client_alone_is_plain_local_training():
    """FedAvg with one client is AdamW on its batches: K steps, nothing else."""
    import optax
    from problem import samples

    machine, rounds, state = setup("fedavg", chunk=1, clip=0.0)
    rows = plan(range(1), cohort=1)
    got = machine.strategy.export(rounds(state, machine.train, rows, 1)[0].server)
    start = params()
    mask = {"layers": True, "classifier": True, "embeddings": False}
    tx = optax.masked(optax.adam(0.05, eps=1e-6), mask)
    opt, trained, data = tx.init(start), start, samples()
    for j in range(K):
        batch = {k: jnp.asarray(v[rows.samples[0, 0, j]]) for k, v in data.items()}
        batch["weight"] = jnp.asarray(rows.weight[0, 0])
        grads = jax.grad(loss)(trained, batch, None)
        grads["embeddings"] = jax.tree.map(jnp.zeros_like, grads["embeddings"])
        updates, opt = tx.update(grads, opt)
        trained = optax.apply_updates(trained, updates)
    assert_close(got, trained, 1e-5)


def test_empty_clients_send_nothing():
    """They fill up a chunk; what is relayed to every client comes from the others."""
    wires = [setup("flora", chunk=c)[0].wire(setup("flora")[2], plan(range(1), 3, c)) for c in (3, 2)]
    assert wires[0] == wires[1] and wires[0].down > 3 * LORA


def test_unknown_names_and_options_list_the_accepted_ones():
    with pytest.raises(ValueError, match=r"unknown method 'fedsgd': choose from .*fedavg, .*fedgalore"):
        strategies.build("fedsgd", lr=1.0)
    with pytest.raises(ValueError, match="fedavg has no option 'momnets': its options are client, moments"):
        strategies.build("fedavg", lr=1.0, momnets="mean")
    with pytest.raises(ValueError, match="moments='kept' is not usable: give one of reset, keep, mean"):
        strategies.build("fedavg", lr=1.0, moments="kept")


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", float("nan")), ("lr", 0.0), ("rank", 0), ("clip", -1.0), ("b1", 1.0), ("eps", 0.0)],
)
def test_common_options_are_checked(name, value):
    with pytest.raises(ValueError, match=f"{name}="):
        strategies.build("fedavg", **({"lr": 1.0} | {name: value}))


def test_roles_must_fit_the_model():
    flat = tree.flatten(params())
    common = strategies.Common(1.0, roles=(("layers", "adapt"), ("head", "train"), (".*", "freeze")))
    with pytest.raises(ValueError, match="'head' matches no parameter"):
        common.split(flat)
    with pytest.raises(ValueError, match="only kernels can be adapted, not classifier/bias"):
        strategies.Common(1.0, roles=((".*", "adapt"),)).split(flat)


def test_every_client_round_and_step_has_a_key_of_its_own():
    """The loss is a number of its key's."""
    machine, _, state = setup("fedavg")

    def drawn(params, batch, key):
        return jax.random.uniform(key) + 0 * params["classifier"]["bias"].sum()

    def seen(client, t, steps):
        rounds = machine._replace(loss=drawn, steps=steps).rounds()
        begin = state._replace(server=state.server._replace(round=jnp.int32(t)))
        rows = absent(plan(range(t, t + 1), steps=steps), *({*range(N)} - {client}))
        return float(rounds(begin, machine.train, rows, 1)[1]["train_loss"][0])

    first = seen(0, 0, 1)
    assert len({first, seen(1, 0, 1), seen(0, 1, 1)}) == 3
    assert seen(0, 0, 2) != pytest.approx(first)


def test_weights_in_half_precision_are_trained_in_float32():
    strategy = strategies.build("fedavg", **OPTIONS)
    state = engine.init(strategy, params(jnp.bfloat16), jax.random.key(0), N)
    assert {x.dtype for x in jax.tree.leaves(strategy.export(state.server))} == {jnp.dtype("float32")}


def test_the_training_loss_weighs_by_samples():
    machine, rounds, state = setup("fedavg")
    rows = plan(range(1))

    def loss_of(*clients):
        return rounds(state, machine.train, absent(rows, *({*range(N)} - {*clients})), 1)[1]["train_loss"][0]

    alone = [loss_of(c) for c in range(N)]
    np.testing.assert_allclose(loss_of(*range(N)), np.average(alone, weights=SIZES), rtol=1e-5)
