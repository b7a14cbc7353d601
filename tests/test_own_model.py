"""A model, a dataset and a method of your own, through `train.run`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from fedgalore_jax import loading, strategies, tasks, train, tree
from fedgalore_jax.adapters import matmuls
from fedgalore_jax.config import Config
from fedgalore_jax.data import Dataset, Split
from fedgalore_jax.models import ModelFns
from fedgalore_jax.strategies.fedit import fedit
from fedgalore_jax.strategies.scaffold import scaffold

SMALL = {"clients": 3, "local_steps": 2, "batch_size": 8, "rank": 2, "lr": 3e-2, "rounds": 2}
WIDTH, CLASSES = 6, 3


def split(n, seed=0, first=0):
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(CLASSES), rng.integers(0, CLASSES, n - CLASSES)]).astype(np.int32)
    x = rng.normal(size=(n, WIDTH)) + 3 * np.eye(CLASSES, WIDTH)[labels]
    return Split({"x": x.astype(np.float32)}, labels + np.int32(first))


def dataset(**changes):
    train = split(60)
    whole = Dataset(train, split(30, 1), split(30, 2), CLASSES, train.labels, ("a", "b", "c"))
    return whole._replace(**changes)


def init(key):
    """One adapted kernel, a head, and an order of inputs: integers, which nothing trains."""
    one, two = jax.random.split(key)
    return {
        "layers": {"kernel": jax.random.normal(one, (WIDTH, 8)) / 3},
        "classifier": {"kernel": jax.random.normal(two, (8, CLASSES)) / 3},
        "order": jnp.arange(WIDTH)[::-1],
    }


def apply(params, inputs, *, key=None):
    del key
    (hidden,) = matmuls(inputs["x"][:, params["order"]], [params["layers"]["kernel"]])
    return jax.nn.relu(hidden) @ params["classifier"]["kernel"]


FNS = ModelFns(None, init, apply)


def run(given=None, params=None, **changes):
    params = init(jax.random.key(0)) if params is None else params
    config = Config(**SMALL | changes)
    return train.run(config, model=(FNS, params), dataset=given or dataset(), say=lambda line: None)


def test_a_run_saves_the_model_by_path(tmp_path):
    result = run(out_dir=tmp_path / "out", keep="best")
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    saved = tree.unflatten(load_file(tmp_path / "out" / "model" / "model.safetensors"))
    jax.tree.map(np.testing.assert_array_equal, saved, result.params)
    assert saved["order"].dtype == np.int32 and (tmp_path / "out" / "summary.json").exists()
    assert run(out_dir=tmp_path / "out", keep="best", resume=True).summary == result.summary


def test_a_method_of_its_own_edits_any_other(tmp_path, monkeypatch):
    monkeypatch.setattr(strategies, "_STRATEGIES", dict(strategies._STRATEGIES))

    @strategies.register
    def halved(common, *, share=0.5):
        base = fedit(common)

        def aggregate(state, upload, cohort):
            change = jax.tree.map(lambda d: share * d, upload.mean["change"])
            return base.aggregate(state, upload._replace(mean={"change": change}), cohort)

        return base._replace(aggregate=aggregate)

    assert "halved" in strategies.names()
    whole = run(method="halved", opt={"share": 1.0})
    assert whole.history[-1]["loss"] == run(method="fedit").history[-1]["loss"]
    assert run(method="halved", out_dir=str(tmp_path / "out")).history[-1]["loss"] > whole.history[-1]["loss"]
    with pytest.raises(ValueError, match="there is a method 'halved' already"):
        strategies.register(halved)


def test_samples_to_judge_by_are_drawn_from_a_dataset_of_ones_own():
    model, config = (FNS, init(jax.random.key(0))), Config(eval_samples=5)
    loaded = loading.load(config, tasks.get("digits"), None, model=model, dataset=dataset())
    assert [len(s.labels) for s in (loaded.dataset.train, loaded.dataset.validation)] == [60, 5]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"train": Split(split(40).inputs, split(60).labels)}, "train split has 60 labels and 40 of x"),
        ({"classes": split(60).labels[:50]}, "classes has 50 entries: give one for each of 60"),
        ({"domains": np.zeros(10, int)}, "domains has 10 entries"),
        ({"test": split(30, 2, first=1)}, "labels of the test split go from 1 to 3: give 0 to 2"),
        ({"validation": split(30, 1, first=-1)}, "labels of the validation split go from -1 to 1"),
        ({"more_tests": {"far": split(30, 3, first=1)}}, "labels of the far split go from 1 to 3"),
        ({"label_names": ("a", "b")}, "2 label_names for 3 labels"),
    ],
)
def test_a_dataset_that_does_not_fit_itself_is_refused(changes, line):
    with pytest.raises(ValueError, match=line):
        run(dataset(**changes))


@pytest.mark.parametrize(
    "field", [{"precision": "bf16"}, {"dropout": 0.5}, {"data": "x.csv"}, {"remat": True}]
)
def test_fields_that_a_given_model_or_dataset_has_already_are_refused(field):
    (name,) = field
    with pytest.raises(ValueError, match=f"{name}=.* would have no effect on a .* of your own"):
        run(**field)


def test_what_is_no_number_before_training_is_said_before_training(tmp_path):
    params = init(jax.random.key(0))
    params["classifier"]["kernel"] = params["classifier"]["kernel"] * jnp.nan
    with pytest.raises(FloatingPointError, match="loss is nan before training"):
        run(params=params, out_dir=str(tmp_path / "out"))


def test_a_class_that_nobody_trains_on_is_still_answered_for():
    """By clients in proportion to their samples."""
    train, without = split(60), split(60).labels
    rows = np.flatnonzero(without != CLASSES - 1)
    data = dataset(train=train.take(rows), classes=without[rows])
    assert run(data, method="fedsa_lora").summary["final"]["accuracy"] > 0


def test_a_memory_of_another_form_is_refused(monkeypatch):
    monkeypatch.setattr(strategies, "_STRATEGIES", dict(strategies._STRATEGIES))

    @strategies.register
    def cut(common):
        base = scaffold(common)

        def finish(download, local, memory, ops):
            upload, memory = base.finish(download, local, memory, ops)
            return upload, jax.tree.map(lambda x: x[:1], memory)

        return base._replace(finish=finish)

    with pytest.raises(ValueError, match=r"finish leaves a memory .* give one as client_init makes it"):
        run(method="cut")
