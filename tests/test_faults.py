"""Clients that drop out, come late, send what is not finite, or send what is finite and wrong."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problem import SIZES, K, N, absent, assert_close, away, plan, setup
from test_checkpoint import TINY

from fedgalore_jax import aggregators, config, plans, prepare, train
from fedgalore_jax.config import Config
from fedgalore_jax.data import FederatedData, faults
from fedgalore_jax.models import configs
from fedgalore_jax.strategies.base import Upload

ROWS = np.random.default_rng(0).normal(size=(6, 3, 2)).astype(np.float32)
MASKS = ([1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1], [0, 1, 0, 0, 1, 1], [0, 0, 0, 1, 0, 0])


def reduced(name, rows, mask, weights=None, **options):
    present = jnp.array(mask, bool)
    weights = jnp.asarray(present / max(sum(mask), 1) if weights is None else weights, jnp.float32)
    rows = jnp.where(present[:, None, None], rows, 0)
    upload = Upload({"change": {"w": rows}}, {"v": rows}, {"s": rows})
    got = aggregators.build(name, **options).reduce(upload, weights, present)
    return got.mean["change"]["w"], got.sum["v"], got.stack["s"]


@pytest.mark.parametrize("mask", MASKS)
def test_medians_are_those_of_the_clients_present(mask):
    kept = ROWS[np.array(mask, bool)]
    mean, summed, stack = reduced("median", ROWS, mask)
    np.testing.assert_allclose(mean, np.median(kept, 0), atol=1e-6)
    np.testing.assert_allclose(summed, sum(mask) * np.median(kept, 0), atol=1e-5)
    low = np.sort(kept, 0)[(len(kept) - 1) // 2]
    high = np.sort(kept, 0)[len(kept) // 2]
    want = np.where(np.array(mask)[:, None, None], np.clip(ROWS, low, high), 0)
    np.testing.assert_allclose(stack, want, atol=1e-6)


@pytest.mark.parametrize(("mask", "dropped"), zip(MASKS, (2, 1, 1, 0), strict=True))
def test_trimmed_means_are_of_what_is_left(mask, dropped):
    kept = np.sort(ROWS[np.array(mask, bool)], 0)
    mean, _, _ = reduced("trimmed_mean", ROWS, mask, trim=0.25)
    np.testing.assert_allclose(mean, kept[dropped : len(kept) - dropped].mean(0), atol=1e-6)


def test_norms_are_cut_to_their_median():
    sizes = np.array([0.1, 1e30, 2.0, 1.0, 0.0, 5.0], np.float32)
    rows = ROWS / np.linalg.norm(ROWS.reshape(6, -1), axis=1)[:, None, None] * sizes[:, None, None]
    weights = np.array([1, 2, 3, 4, 0, 5]) / 15
    mean, summed, stack = reduced("norm_clip", rows, [1, 1, 1, 1, 0, 1], weights)
    want = rows / np.maximum(sizes, 2)[:, None, None] * 2
    np.testing.assert_allclose(stack, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mean, np.tensordot(weights, want, 1), atol=1e-5)
    np.testing.assert_allclose(summed, want.sum(0), atol=1e-5)


@pytest.mark.parametrize("name", ["median", "trimmed_mean", "norm_clip"])
def test_a_part_without_arrays_stays_as_it_is(name):
    """Second moments of what is trained plainly, of a model where nothing is."""
    rows, weights, present = jnp.ones((3, 2)), jnp.ones(3) / 3, jnp.ones(3, bool)
    upload = Upload({"change": {"w": rows}, "nu": {}}, stack={"s": rows})
    got = aggregators.build(name).reduce(upload, weights, present)
    assert got.mean["nu"] == {} and got.sum == ()
    np.testing.assert_allclose(got.mean["change"]["w"], 1, rtol=1e-6)


@pytest.mark.parametrize("name", ["median", "trimmed_mean", "norm_clip"])
def test_nobody_is_nothing(name):
    assert all(not x.any() for x in reduced(name, ROWS, [0] * 6))


@pytest.mark.parametrize("name", ["median", "trimmed_mean"])
@pytest.mark.parametrize("poison", [1e30, -1e30, 3e38])
def test_a_minority_moves_nothing_beyond_the_others(name, poison):
    wild = ROWS.copy()
    wild[[1, 4]] = poison
    mean, _, stack = reduced(name, wild, [1] * 6, trim=1 / 3)
    others = np.delete(ROWS, [1, 4], 0)
    for x in (np.asarray(mean), np.asarray(stack)):
        assert (x >= others.min(0) - 1e-6).all() and (x <= others.max(0) + 1e-6).all()


# ---- what is not finite ----


@pytest.fixture(scope="module")
def built():
    """One compilation per method and aggregator."""

    @functools.cache
    def get(method, aggregator="mean", **options):
        machine, _, state = setup(method, chunk=1 if method == "scaffold" else N, **options)
        machine = machine._replace(aggregator=aggregators.build(aggregator))
        return machine, machine.rounds(), state

    return get


def spoiled(machine, value, *clients):
    """The training set with samples of some clients exchanged for a value."""
    of = np.concatenate([np.split(np.arange(36), np.cumsum((7, 12, 5, 9)))[c] for c in clients])
    return machine.train | {"labels": machine.train["labels"].at[of].set(value)}


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("method", "aggregator"),
    [("fedavg", "mean"), ("scaffold", "mean"), ("fedgalore", "mean"), ("fedgalore", "trimmed_mean")],
)
def test_a_client_that_is_not_finite_is_as_good_as_absent(built, method, aggregator, value):
    machine, rounds, state = built(method, aggregator)
    rows = plan(range(2))
    want, metrics = rounds(state, machine.train, absent(rows, 1, 3), 2)
    got, bad = rounds(state, spoiled(machine, value, 1, 3), rows, 2)
    assert_close(got, want, 1e-6)
    assert metrics["rejected"].tolist() == [0, 0] and bad["rejected"].tolist() == [2, 2]
    np.testing.assert_allclose(bad["train_loss"], metrics["train_loss"], rtol=1e-5)


@pytest.mark.parametrize("method", ["scaffold", "fedgalore"])
def test_a_round_that_nobody_comes_through_keeps_everything_but_its_number(built, method):
    machine, rounds, state = built(method)
    rows = plan(range(2))
    state, _ = rounds(state, machine.train, rows, 1)
    everyone = range(N)
    for data, who in (
        (spoiled(machine, np.nan, *everyone), rows),
        (machine.train, absent(rows, *everyone)),
    ):
        after, metrics = rounds(state, data, who, 1)
        assert int(after.server.round) == int(state.server.round) + 1 == 2
        assert (after.last == 1).all()  # everyone was sent it
        kept = after._replace(server=after.server._replace(round=state.server.round), last=state.last)
        assert_close(kept, state, 0)
        assert np.isnan(metrics["train_loss"][0])


def test_a_round_after_a_lost_one_is_as_good_as_new(built):
    machine, rounds, state = built("fedgalore")
    after, _ = rounds(state, spoiled(machine, np.nan, *range(N)), plan(range(1)), 1)
    after, metrics = rounds(after, machine.train, plan(range(1, 2)), 1)
    assert np.isfinite(metrics["train_loss"][0]) and metrics["rejected"][0] == 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(machine.strategy.export(after.server)))


# ---- who drops out, who is late ----

FEDERATION = FederatedData([np.arange(4 * c, 4 * c + 4) for c in range(200)], seed=5)


def drawn(rounds=range(3), cohort=150):
    return FEDERATION.plan(rounds, cohort, 6, 2)


def test_dropouts_are_drawn_by_client_and_round_and_change_nothing_else():
    whole = faults.without(drawn(), range(3), 5, 0.3)
    assert 0.25 < (whole.counts == 0).mean() < 0.35
    assert (whole.counts[0] == 0).tolist() != (whole.counts[1] == 0).tolist()
    np.testing.assert_array_equal(whole.samples, drawn().samples)
    late = faults.without(drawn(range(2, 3)), range(2, 3), 5, 0.3)
    np.testing.assert_array_equal(late.counts[0], whole.counts[2])
    assert (faults.without(drawn(), range(3), 6, 0.3).counts != whole.counts).any()


@pytest.mark.parametrize(
    ("law", "share"),
    [
        ("exponential:2", lambda t: 1 - np.exp(-t / 2)),
        ("uniform:1:3", lambda t: np.clip((t - 1) / 2, 0, 1)),
    ],
)
def test_stragglers_get_as_far_as_their_speed_takes_them(law, share):
    """k steps by the deadline: a step takes a k-th of it or less."""
    rows = faults.late(drawn(range(20)), range(20), 5, law, 6.0)
    gone = rows.counts == 0
    assert abs((1 - share(6.0)) - gone.mean()) < 0.02
    for k in range(1, 7):
        assert abs(share(6.0 / k) - ((rows.steps >= k) & ~gone).mean()) < 0.02
    assert rows.steps.min() >= 1 and rows.steps.max() <= 6


def test_who_drops_out_was_sent_the_round():
    """It is charged for no round that it was sent, and for every other."""
    machine, rounds, state = setup("fedlore", chunk=1)
    rows = absent(away(plan(range(3)), 2, 1), 1)
    _, metrics = rounds(state, machine.train, rows, 3)
    one = machine.wire(state, rows).catch_up
    assert one > 0
    np.testing.assert_array_equal(metrics["bytes_catch_up"], [0, 0, one])


@pytest.mark.parametrize("law", ["normal:1", "exponential", "exponential:0", "uniform:1", "exponential:x"])
def test_other_laws_are_refused(law):
    with pytest.raises(ValueError, match=r"straggler=.*exponential:MEAN"):
        faults.time_of(law)


def test_a_first_round_without_anyone_is_none():
    """FedGLOMO's momentum begins with the first change that there is."""
    machine, rounds, state = setup("fedglomo")
    two = plan(range(2))
    late, _ = rounds(
        state, machine.train, two._replace(counts=two.counts * np.array([[0], [1]], np.int32)), 2
    )
    on_time, _ = rounds(state, machine.train, plan(range(1, 2)), 1)
    assert_close(late.server.trainable, on_time.server.trainable, 1e-6)


@pytest.mark.parametrize("method", ["scaffold", "fedglomo", "fedgalore", "fedadamw", "fedlada"])
def test_a_straggler_is_a_client_with_fewer_steps(method):
    """Also its control variate, the mean of the gradients that it got to, and what the server counts."""
    machine, rounds, state = setup(method, chunk=1)
    rows = absent(plan(range(1)), *range(1, N))
    got, metrics = rounds(state, machine.train, rows._replace(steps=np.full((1, N), K - 1, np.int32)), 1)
    machine, rounds, state = setup(method, chunk=1, steps=K - 1)
    want, wanted = rounds(state, machine.train, absent(plan(range(1), steps=K - 1), *range(1, N)), 1)
    assert_close(got, want, 1e-6)
    np.testing.assert_allclose(metrics["train_loss"], wanted["train_loss"], rtol=1e-5)


def test_a_config_s_faults_are_in_its_plan():
    base = Config(clients=200, cohort=150, batch_size=2, local_steps=6, seed=5)
    args = 50, FEDERATION, range(1)
    whole = plans.plan(base, *args)
    assert whole.steps is None and (whole.counts > 0).all()
    fewer = plans.plan(dataclasses.replace(base, client_dropout=0.5), *args)
    late = plans.plan(dataclasses.replace(base, straggler="exponential:1", deadline=3.0), *args)
    assert (fewer.counts == 0).any() and fewer.steps is None
    assert late.steps.shape == (1, 150) and 1 < late.steps.mean() < 6


# ---- a whole run ----


@pytest.fixture(scope="module")
def unlucky():
    """A run, not begun, in whose second round nobody's upload is finite, and how many drop out of each."""
    sizes = {"rounds": 4, "clients": 5, "cohort": 4, "local_steps": 1}
    config = Config(method="fedavg", client_dropout=0.4, aggregator="median", lr=0.01, seed=2, **sizes)
    fns = configs.family_of(TINY).build(TINY, scan_layers=True)
    ready = prepare.prepare(config, model=(fns, fns.init(jax.random.key(0))))
    strategy = ready.machine.strategy

    def finish(download, local, memory, ops):
        upload, memory = strategy.finish(download, local, memory, ops)
        return jax.tree.map(lambda x: jnp.where(download.round == 1, jnp.nan, x), upload), memory

    machine = ready.machine._replace(strategy=strategy._replace(finish=finish))
    rounds = machine.rounds()
    ready = ready._replace(machine=machine, compile=lambda: rounds)
    drawn = plans.plan(dataclasses.replace(ready.config, eval_every=4), 4, ready.federation, range(4))
    return ready, (drawn.counts == 0).sum(1).tolist()


def test_a_lost_round_keeps_the_model_and_the_run_goes_on(unlucky):
    ready, gone = unlucky
    _, history, summary = train.execute(ready, say=lambda line: None)
    assert [record.get("absent", 0) for record in history[1:]] == gone and sum(gone)
    assert [record.get("rejected", 0) for record in history[1:]] == [0, 4 - gone[1], 0, 0]
    assert ["train_loss" in record for record in history] == [False, True, False, True, True]
    assert history[2]["loss"] == history[1]["loss"] != history[3]["loss"]
    up, down = (summary["bytes_per_client_and_round"][way] for way in ("up", "down"))
    assert summary["bytes_total"] == 16 * down + (16 - sum(gone)) * up


def test_a_run_of_lost_rounds_gives_up(unlucky, monkeypatch):
    monkeypatch.setattr(train, "HOPELESS", 1)
    with pytest.raises(FloatingPointError, match="sent in rounds 2 to 2 was finite: lower --lr"):
        train.execute(unlucky[0], say=lambda line: None)


def test_the_aggregators_of_a_config_are_those_there_are():
    for name in config.AGGREGATORS:
        aggregators.build(name)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"client_dropout": 1.0}, "client_dropout=1.0 is not usable"),
        ({"straggler": "exponential:1"}, "give --deadline too"),
        ({"deadline": 1.0}, "give --straggler too"),
        ({"dp_clip": 1.0}, "give --dp_noise too"),
        ({"trim": 0.2}, "give --aggregator=trimmed_mean too"),
        ({"trim": 0.5, "aggregator": "trimmed_mean"}, "give a number between 0 and 1/2"),
        ({"aggregator": "mode"}, "one of mean, median, trimmed_mean, norm_clip"),
        ({"aggregator": "median", "cohort": 2}, "a cohort of 3 at least"),
        ({"aggregator": "median", "dp_clip": 1.0, "dp_noise": 1.0}, "give mean, with --dp_clip"),
        ({"aggregator": "median", "method": "flora"}, "flora .* sends bases, ranks, layers or factors"),
        ({"aggregator": "norm_clip", "opt": {"basis": "own"}}, "fedgalore .* sends bases, ranks"),
        ({"straggler": "exponential:1", "deadline": 1.0, "method": "adel_fl"}, "stragglers of its own"),
        ({"straggler": "slow", "deadline": 1.0}, "straggler='slow' is not usable"),
    ],
)
def test_what_cannot_be_meant_is_refused(given, line):
    with pytest.raises(ValueError, match=line):
        prepare.prepare(Config(**given))


def test_faults_of_a_round_do_not_hang_on_where_blocks_begin():
    federation = FederatedData([np.arange(4 * c, 4 * c + 4) for c in range(200)], seed=5)
    config = Config(clients=200, cohort=150, batch_size=2, local_steps=6, seed=5)
    for fault in ({"client_dropout": 0.5}, {"straggler": "exponential:1", "deadline": 3.0}):
        config_ = dataclasses.replace(config, **fault)
        whole, late = (plans.plan(config_, 50, federation, rounds) for rounds in (range(3), range(2, 3)))
        for a, b in zip(*map(jax.tree.leaves, (whole, late)), strict=True):
            np.testing.assert_array_equal(a[2:], b)


def test_the_server_counts_the_weighted_mean_of_steps():
    machine, rounds, state = setup("fedadamw")
    steps = np.array([[1, 3, 1, 1, 1]], np.int32)
    after, _ = rounds(state, machine.train, plan(range(1))._replace(steps=steps), 1)
    assert int(after.server.extra["count"]) == round(np.average(steps[0], weights=SIZES)) == 2


def test_the_median_of_many_is_one():
    rows = jnp.asarray(np.random.default_rng(1).exponential(size=(21, 4)), jnp.float32)
    present = jnp.ones(21, bool)
    got = aggregators.build("median").reduce(Upload({"change": {"w": rows}}), present / 21, present)
    np.testing.assert_allclose(got.mean["change"]["w"], np.median(rows, 0), rtol=1e-6)
