"""What travels with a block of rounds: memories of clients that the host keeps."""

import dataclasses

import jax
import numpy as np
import pytest
from problem import B, K, N, assert_close, m, n, params, plan, setup

from fedgalore_jax import blocks, engine, placement, tree
from fedgalore_jax.blocks import Blocks
from fedgalore_jax.config import Config

COHORT = 2


@pytest.fixture(scope="module")
def scaffold():
    return setup("scaffold", chunk=COHORT)


def test_memories_on_the_host_are_the_same(scaffold):
    """With a slot more than there are clients, as a mesh may need."""
    machine, rounds, whole = scaffold
    store = blocks.on_host(machine, params(), N)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(store))
    assert_close(store, whole.clients, 0)
    state = whole._replace(clients=store)
    for t in range(4):
        rows = plan(range(t, t + 1), COHORT, COHORT)
        whole, wanted = blocks.advance(rounds, machine, whole, rows, 1, Blocks(1, None, 0))
        state, metrics = blocks.advance(rounds, machine, state, rows, 1, Blocks(1, COHORT + 1, 0))
        assert state.clients is store
        assert_close((state, metrics), (whole, wanted), 0)
    assert sorted(state.last.tolist()) == [-1, 1, 2, 3, 3]  # some came back, and one never came


def test_a_state_apart_stays_as_it_is(scaffold):
    machine, rounds, state = scaffold
    state = state._replace(clients=blocks.on_host(machine, params(), N))
    kept, before = tree.apart(state), jax.tree.map(np.copy, state.clients)
    state, _ = blocks.advance(
        rounds, machine, state, plan(range(1), COHORT, COHORT), 1, Blocks(1, COHORT + 1, 0)
    )
    assert_close(kept.clients, before, 0)
    assert any((x != y).any() for x, y in zip(*map(jax.tree.leaves, (state.clients, before)), strict=True))


def test_a_block_is_cut_to_what_fits(scaffold, monkeypatch):
    machine, _, state = scaffold
    config = Config(clients=N, cohort=COHORT, rounds=40, eval_every=20, local_steps=K, batch_size=B)
    shapes = jax.eval_shape(lambda: state.clients)
    one = tree.nbytes(shapes) // N
    for room, wanted in ((N, (20, None)), (N - 1, (2, 4)), (3, (1, 2)), (0, (1, 2))):
        monkeypatch.setattr(blocks, "RESIDENT", room * one)
        assert blocks.cut(config, machine, 9, shapes) == Blocks(*wanted, 0), room
    everyone = dataclasses.replace(config, cohort=N)
    assert blocks.cut(everyone, machine, 9, shapes) == Blocks(20, None, 0)


@pytest.mark.parametrize(
    ("method", "kept"), [("fedit", {"kernel", "shift"}), ("fedavg", {"shift"}), ("fedex_lora", {"shift"})]
)
def test_what_no_round_changes_is_there_once(method, kept):
    """It is the model's own array in every state, and no output of the program."""
    machine, rounds, _ = setup(method)
    given = params()
    state = engine.init(machine.strategy, given, jax.random.key(0), N)
    after, _ = rounds(state, machine.train, plan(range(2)), 2)
    moved, _ = jax.eval_shape(machine.program(), state, machine.train, plan(range(2)), 2)
    frozen = engine.frozen(machine.strategy, given, N, moved)
    names = {id(leaf): path.rsplit("/")[-1] for path, leaf in tree.flatten(given).items()}
    for states in (after, frozen):
        assert {names[id(x)] for x in jax.tree.leaves(states) if id(x) in names} == kept
    assert kept.isdisjoint(path.rsplit("/")[-1] for path, x in moved.server.frozen.items() if x is not None)
    assert moved.key is None and after.key is state.key
    spread = jax.eval_shape(
        lambda given: engine.init(machine.strategy, given, state.key, N, placement.mesh("1x1")), given
    )
    assert jax.tree.structure(spread) == jax.tree.structure(state)


def test_the_seed_reaches_the_state():
    machine, _, _ = setup("fedgalore")
    one, two = (blocks.start(Config(clients=N, seed=seed), machine, params()) for seed in (0, 1))
    bases = [state.server.extra.basis["layers/kernel"] for state in (one, two)]
    assert np.abs(bases[0] - bases[1]).max() > 0.1


def test_a_block_whose_samples_travel_is_cut_to_what_fits(monkeypatch):
    machine, _, state = setup("scaffold", chunk=2)
    machine = machine._replace(streams=True)
    config = Config(clients=N, cohort=2, rounds=40, eval_every=20, local_steps=K, batch_size=B)
    shapes = jax.eval_shape(lambda: state.clients)
    assert blocks.cut(config, machine, 9, shapes).samples == 9 < K * B
    monkeypatch.setattr(blocks, "RESIDENT", 7 * 2 * 9 * 4 * (m + n))
    assert blocks.cut(config, machine, 9, shapes) == Blocks(7, None, 9)
