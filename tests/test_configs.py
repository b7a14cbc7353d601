"""Configs drawn at random: what is sound runs two rounds, what is not is refused in one line."""

import dataclasses
import functools
import math
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_llama
import tiny_vit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.launch_local import environment
from fedgalore_jax import prepare, strategies, train
from fedgalore_jax.config import AGGREGATORS, Config
from fedgalore_jax.data import IGNORE, PARTITIONS, Dataset, Split

ROOT = pathlib.Path(__file__).parents[1]
SAMPLES, CLASSES, DOMAINS = 60, 3, 2
MESHES = ("1x1", "2x1", "1x2", "2x2", "4x2", "2x4", "8x1", "1x8")


@functools.cache
def world(task):
    """A model of a few hundred weights and random samples for it, whose classes differ in frequency."""
    rng = np.random.default_rng(0)
    labels = rng.choice(CLASSES, SAMPLES, p=(0.5, 0.3, 0.2)).astype(np.int32)
    names = tuple("abc")
    if task == "images":
        config = dataclasses.replace(tiny_vit.CONFIG, num_hidden_layers=2, labels=names)
        model, inputs = tiny_vit.model(config), {"pixel_values": rng.normal(size=(SAMPLES, 6, 6, 3))}
    elif task == "sft":
        model = tiny_llama.model(dataclasses.replace(tiny_llama.TIED, num_hidden_layers=2))
        inputs = {"input_ids": rng.integers(1, 61, (SAMPLES, 6)).astype(np.int32)}
        inputs["attention_mask"] = np.ones((SAMPLES, 6), np.int32)
    else:
        one = ("0",) if task == "glue/stsb" else names
        config = dataclasses.replace(tiny_vit.BERT, num_hidden_layers=2, labels=one)
        model = tiny_vit.model(config)
        inputs = {"input_ids": rng.integers(5, 30, (SAMPLES, 6)).astype(np.int32)}
        inputs |= {"attention_mask": np.ones((SAMPLES, 6), np.int32)}
        inputs |= {"token_type_ids": np.zeros((SAMPLES, 6), np.int32)}
    inputs = {k: x.astype(np.float32) if x.dtype == np.float64 else x for k, x in inputs.items()}
    targets = labels
    if task == "sft":
        targets = np.where(np.arange(6) < 3, IGNORE, inputs["input_ids"]).astype(np.int32)
    elif task == "glue/stsb":
        targets, names = labels + rng.normal(size=SAMPLES).astype(np.float32), ()
    split = Split(inputs, targets)
    domains = np.arange(SAMPLES) % DOMAINS
    num_labels = {"sft": 0, "glue/stsb": 1}.get(task, CLASSES)
    judged = split.take(np.arange(20))
    return model, Dataset(split, judged, judged, num_labels, labels, names, domains, tuple("de"))


TASKS = ("images", "text", "glue/stsb", "sft")
OWN = ("adel_fl", "fedex_lora", "flexlora", "flora", "galore_avg", "hetlora", "ilora", "lora_a2", "lora_fair")
"""Methods whose uploads cannot be compared entry by entry."""


def sizes(mesh):
    return tuple(map(int, mesh.split("x"))) if mesh else (1, 1)


@st.composite
def sound(draw):
    """A config that there is no reason to refuse."""
    clients = draw(st.integers(1, 6))
    cohort = draw(st.none() | st.integers(1, clients))
    taking_part = cohort or clients
    task, method = draw(st.sampled_from(TASKS)), draw(st.sampled_from(strategies.names()))
    mesh = draw(st.none() | st.sampled_from([m for m in MESHES if math.prod(sizes(m)) <= jax.device_count()]))
    shares, _ = sizes(mesh)
    kinds = [k for k in PARTITIONS if "domain" not in k or clients >= DOMAINS]
    if method in ("fedsa_lora", "dual_adapter"):  # each client's model answers for its share of the classes
        task, kinds = draw(st.sampled_from(("images", "text"))), [k for k in kinds if "domain" not in k]
    given = {
        "task": task,
        "method": method,
        "clients": clients,
        "cohort": cohort,
        "chunk": draw(st.none() | st.integers(1, 8).map(lambda n: n * shares)),
        "mesh": mesh,
        "partition": draw(st.none() | st.sampled_from(kinds)),
        "local_steps": draw(st.integers(2, 3)),
        "batch_size": draw(st.integers(1, 4)),
        "eval_every": draw(st.integers(1, 2)),
        "rank": draw(st.integers(2, 3)),
        "schedule": draw(st.sampled_from(("constant", "cosine"))),
        "weight_decay": draw(st.sampled_from((0.0, 0.01))) if method != "ssf" else 0.0,
        "client_dropout": draw(st.sampled_from((0.0, 0.4))),
        "seed": draw(st.integers(0, 3)),
    }
    if method not in OWN and taking_part > 2:
        given["aggregator"] = draw(st.sampled_from(AGGREGATORS))
    if method != "adel_fl" and draw(st.booleans()):
        given |= {"straggler": "exponential:1", "deadline": draw(st.sampled_from((1.0, 4.0)))}
    return given


def config_of(given):
    return Config(**({"lr": 1e-3, "rounds": 2} | given))


def run(given):
    model, dataset = world(given["task"])
    return train.run(config_of(given), model=model, dataset=dataset, say=lambda line: None)


def runs_two_rounds(given):
    result = run(given)
    assert [record["round"] for record in result.history] == [0, 1, 2]
    for record in result.history[1:]:
        sent = (given["cohort"] or given["clients"]) - record.get("absent", 0)
        assert record.get("rejected", 0) == 0 and ("train_loss" in record) == (sent > 0)
        assert all(np.isfinite(value).all() for value in record.values())
    assert all(np.isfinite(value) for value in result.summary["final"].values())


BAD = {
    "task": ["nothing"],
    "method": ["fedsgd"],
    "clients": [0, -1, 61],
    "cohort": [0, 7],
    "chunk": [0],
    "partition": ["random"],
    "local_steps": [0],
    "batch_size": [0],
    "eval_every": [0],
    "rank": [0],
    "schedule": ["steep"],
    "weight_decay": [-0.1, float("nan")],
    "client_dropout": [-0.1, 1.0, float("nan")],
    "seed": [-1],
    "lr": [0.0, -1.0, float("inf"), float("nan")],
    "aggregator": ["mode"],
    "straggler": ["normal:1", "exponential:-1"],
    "deadline": [0.0, float("nan")],
    "trim": [0.5],
    "dp_clip": [0.0],
    "dp_noise": [-1.0],
    "mesh": ["0x1", "2", "9x9"],
    "opt": [{"nonsense": 1}, {"rank": 1.5}, {"roles": 1}],
}
"""Values that cannot be meant, whatever the others are."""


@st.composite
def unsound(draw):
    """A sound config with one value that cannot be meant, and its field's name."""
    given, name = draw(sound()), draw(st.sampled_from(sorted(BAD)))
    shares, _ = sizes(given["mesh"])
    value = draw(st.sampled_from(BAD[name] + [shares + 1] * (name == "chunk" and shares > 1)))
    return given | {name: value}, name


def is_refused(given, name):
    """In one line, which says what to change, and before anything is compiled."""
    task = given["task"] if given["task"] in TASKS else "images"
    model, dataset = world(task)
    with pytest.raises(ValueError) as error:
        prepare.prepare(config_of(given), model=model, dataset=dataset)
    line = str(error.value)
    assert line and "\n" not in line and name.replace("method", "").replace("opt", "") in line, line


quick = settings(
    max_examples=3, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.slow  # here; the process with eight devices draws one device as well
@quick
@given(sound())
def test_sound_configs_run_two_rounds(given):
    runs_two_rounds(given)


@pytest.mark.slow
@settings(quick, max_examples=80)
@given(sound())
def test_many_sound_configs_run_two_rounds(given):
    runs_two_rounds(given)


@settings(quick, max_examples=400)
@given(unsound())
def test_unsound_configs_are_refused_in_one_line(given):
    is_refused(*given)


@pytest.mark.parametrize("which", ["few", pytest.param("many", marks=pytest.mark.slow)])
def test_on_eight_devices(which):
    """In a process that has them, the tests above draw meshes of them."""
    chosen = {"few": "two_rounds and not many or one_line", "many": "many_sound"}[which]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "", "-k", chosen, __file__]
    done = subprocess.run(command, cwd=ROOT, env=environment(8), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
