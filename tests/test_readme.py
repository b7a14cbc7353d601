"""The README's Python runs, and what it names exists."""

import itertools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from problem import OPTIONS, K, N, loss, params, plan, samples
from test_architecture import FLOORS, floor

from experiments import launch
from fedgalore_jax import engine, strategies, tasks

ROOMS = set().union(*FLOORS)
ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_a_new_method_is_as_short_as_it_says(monkeypatch):
    (block,) = [block for block in BLOCKS if "def fedavgm" in block]
    assert len(block.splitlines()) <= 30
    monkeypatch.setattr(strategies, "_STRATEGIES", dict(strategies._STRATEGIES))
    exec(block, {})
    out = {}
    for beta in (0.0, 0.9):
        strategy = strategies.build("fedavgm", **OPTIONS, beta=beta)
        train = {name: jnp.asarray(x) for name, x in samples().items()}
        machine = engine.Engine(strategy, loss, train, N, K, N)
        state = engine.init(strategy, params(), jax.random.key(0), N)
        state, _ = machine.rounds()(state, train, plan(range(2)), 2)
        out[beta] = strategy.export(state.server)["layers"]["kernel"]
    plain = strategies.build("fedavg", **OPTIONS)
    state = engine.init(plain, params(), jax.random.key(0), N)
    machine = machine._replace(strategy=plain)
    state, _ = machine.rounds()(state, train, plan(range(2)), 2)
    np.testing.assert_allclose(out[0.0], plain.export(state.server)["layers"]["kernel"], atol=1e-6)
    assert np.abs(out[0.9] - out[0.0]).max() > 1e-2


def test_the_transform_and_the_extraction_as_shown():
    lift, extract = (next(b for b in BLOCKS if word in b) for word in ("import galore", "import ajive"))
    weights = {"kernel": jnp.ones((32, 16))}
    names = {"params": weights, "grads": {"kernel": jnp.full((32, 16), 0.5)}}
    exec(lift, names)
    assert names["updates"]["kernel"].shape == (32, 16)
    blocks = jnp.tile(jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 20))), (5, 1, 1))
    names = {"blocks": blocks.astype(jnp.float32), "participation": jnp.ones(5)}
    exec(extract, names)
    assert names["signal"].joint.shape == (5, 8, 20) and int(names["signal"].rank) == 4


def test_flags_files_and_methods_it_names_exist():
    from absl import flags

    values = flags.FlagValues()
    launch.define(values)
    for line in re.findall(r"run\.py (--.*)", README):
        for flag in re.findall(r"--(\w+)", line):
            assert flag in values or flag == "flagfile", flag
    for file in re.findall(r"--flagfile=(\S+)", README):
        assert (ROOT / file).exists(), file
    assert names_in("| method | trains |") == set(strategies.names())
    assert {name.replace("…", "glue") for name in names_in("| task | data |")} == set(tasks.names())


def test_the_house_has_every_room():
    house = README.partition("## The house")[2].split("```")[1]
    rooms = set(re.findall(r"\w+", house))
    for folder in ("fedgalore_jax", "experiments"):
        there = {path.stem for path in (ROOT / folder).iterdir() if path.suffix == ".py" or path.is_dir()}
        assert {name for name in there if not name.startswith("__")} <= rooms, folder
    lines = house.partition("fedgalore_jax/\n")[2].splitlines()
    named = [floor(name) for line in lines for name in re.findall(r"\w+", line[:34]) if name in ROOMS]
    assert named == sorted(named, reverse=True)


def names_in(header: str) -> set[str]:
    """What is set as code in the first column of the table with that header."""
    _, _, rest = README.partition(header)
    rows = itertools.takewhile(lambda line: line.startswith("|"), rest.splitlines()[2:])
    return {name for row in rows for name in re.findall(r"`(\S+)`", row.split("|")[1])}
