"""Outputs in order whatever the batches and buckets; the model that is kept; a saved model asked again."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_vit
from test_launch import SMALL, launch, lines

from fedgalore_jax import evaluation, loading, models, prepare, results, saved, tasks, train
from fedgalore_jax.config import Config
from fedgalore_jax.data import Dataset, Generation, Split, digits
from fedgalore_jax.data.federated import OWNERS
from fedgalore_jax.data.partition import owners
from fedgalore_jax.evaluation import evaluator, in_batches

SHAPE = {"rounds": 4, "local_steps": 2, "clients": 4, "rank": 2, "method": "fedit"}


def quiet(**changes):
    return train.run(Config(**(SHAPE | changes)), say=lambda line: None)


def test_outputs_come_back_in_order_whatever_the_buckets(monkeypatch):
    """A model that adds up its tokens; lengths from 1 to 70 fall into several buckets and batches."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 70, 23)
    mask = (np.arange(70) < lengths[:, None]).astype(np.int32)
    tokens = rng.integers(1, 9, (23, 70)).astype(np.int32) * mask
    split = Split({"input_ids": tokens, "attention_mask": mask}, np.zeros(23, np.int32))
    seen = []

    def apply(params, inputs, *, key=None):
        seen.append(inputs["input_ids"].shape)
        return params * inputs["input_ids"].sum(1, keepdims=True)

    task = tasks.get("digits")._replace(eval_batch=4)
    it = evaluator(task, models.ModelFns(None, lambda key: None, apply))
    np.testing.assert_array_equal(it.outputs(jnp.int32(3), split)[:, 0], 3 * tokens.sum(1))
    monkeypatch.setattr(evaluation, "AT_ONCE", 0)  # a batch at a time
    np.testing.assert_array_equal(it.outputs(jnp.int32(3), split)[:, 0], 3 * tokens.sum(1))
    assert len({shape[1] for shape in seen}) > 2 and max(shape[0] for shape in seen) <= 4


def test_batches_hold_every_sample_in_one_shape():
    cut = in_batches(np.arange(10), 4, 9)
    assert cut.shape == (1, 3, 4) and cut.reshape(-1)[:10].tolist() == list(range(10))
    assert in_batches(np.arange(3), 4, 9).tolist() == [[[0, 1, 2, 0]]]
    cut = in_batches(np.arange(21), 4, 4)
    assert cut.shape == (2, 3, 4) and cut.reshape(-1)[:21].tolist() == list(range(21))


def test_the_best_model_on_validation_is_kept():
    best = quiet(keep="best", lr=0.05)
    scores = [record["accuracy"] for record in best.history[1:]]
    first = 1 + scores.index(max(scores))
    assert best.summary["best"]["round"] == first and first < 4, "this seed was chosen to peak early"
    last = quiet(rounds=first, lr=0.05)
    jax.tree.map(np.testing.assert_array_equal, best.params, last.params)
    assert best.summary["final"] == last.summary["final"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "one"
    launch(*SMALL, "--method=fedit", f"--out_dir={out}")
    return out


def test_a_saved_model_scores_what_its_run_said(finished, capsys):
    launch(f"--evaluate={finished / 'model'}", "--task=digits")
    said = json.loads(capsys.readouterr().out)
    assert said == pytest.approx(json.loads((finished / "summary.json").read_text())["final"], rel=1e-5)
    assert lines(finished / "metrics.jsonl")[-1]["accuracy"] > 0.2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--evaluate=/nowhere"], "/nowhere/config.json does not exist"),
        (["--evaluate=a", "--predict=b"], "give one of them"),
        (["--plan", "--predict=b"], "plan and predict are two runs: give one of them"),
        (["--evaluate=a", "--out_dir=b"], "write to standard output"),
        (["--predict=b"], "predict needs --model"),
    ],
)
def test_bad_questions_are_one_line(args, message, capsys):
    with pytest.raises(SystemExit) as stop:
        launch(*args)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_personal_models_answer_for_their_own_clients(tmp_path):
    """The run's pooled accuracy, again from the saved models of all clients and whose sample is whose."""
    config = Config(
        **(SHAPE | {"method": "fedsa_lora", "lr": 3e-3, "rounds": 2, "out_dir": str(tmp_path / "out")})
    )
    prepared = prepare.prepare(config)
    result = train.execute(prepared, say=lambda line: None)
    test, dataset = prepared.loaded.dataset.test, prepared.loaded.dataset
    rng = np.random.default_rng([config.seed, OWNERS])
    whose = owners(test.labels, prepared.federation.parts, dataset.classes, rng)
    right = 0
    for client in range(config.clients):
        fns, params = models.load(tmp_path / "out" / "models" / f"client-{client}")
        split = test.take(np.flatnonzero(whose == client))
        outputs = evaluator(prepared.task, fns).outputs(params, split)
        right += (outputs.argmax(1) == split.labels).sum()
    assert result.summary["personal"] and not (tmp_path / "out" / "model").exists()
    assert right / len(test.labels) == result.summary["final"]["accuracy"] > 0.3


def test_owners_follow_the_classes_of_their_clients():
    classes = np.repeat([0, 1, 2], 100)
    parts = [np.r_[0:100, 200:225], np.r_[100:200, 225:300]]
    labels = np.tile([0, 1, 2], 400)
    whose = owners(labels, parts, classes, np.random.default_rng(0))
    assert (whose[labels == 0] == 0).all() and (whose[labels == 1] == 1).all()
    assert 0.7 < whose[labels == 2].mean() < 0.8


def test_fewer_samples_may_judge():
    config = Config(eval_samples=30, task="digits")
    whole = loading.load_data(config, tasks.get("digits"))
    few = loading.judged(config, whole)
    assert len(few.validation.labels) == len(few.test.labels) == 30 < len(whole.test.labels)
    np.testing.assert_array_equal(few.train.labels, whole.train.labels)


def test_classes_are_compared_by_name():
    """A head for the same classes in another order answers in the data's order; other classes are refused."""
    fns, params = models.load(tiny_vit.SHIPPED)
    split = digits.load().test.take(np.arange(20))
    plain = np.asarray(fns.apply(params, {"pixel_values": jnp.asarray(split.inputs["pixel_values"])}))
    dataset = digits.load()
    turned = dataset._replace(label_names=tuple("1032456789"))
    other = loading.with_classes(fns, turned, drawn=False)
    got = np.asarray(other.apply(params, {"pixel_values": jnp.asarray(split.inputs["pixel_values"])}))
    np.testing.assert_array_equal(got, plain[:, [1, 0, 3, 2, 4, 5, 6, 7, 8, 9]])
    assert loading.with_classes(fns, dataset, drawn=False) is fns
    letters = dataset._replace(label_names=tuple("abcdefghij"))
    with pytest.raises(ValueError, match=r"the model.s classes are 0, 1, 2.* the data.s a, b, c"):
        loading.with_classes(fns, letters, drawn=False)
    assert loading.with_classes(fns, letters, drawn=True).config.labels == tuple("abcdefghij")


def test_another_seed_is_tested_on_the_same_samples():
    """The run's seed deals clients and batches; it never moves a sample between training and test."""
    splits = [loading.load_data(Config(seed=seed), tasks.get("digits")) for seed in (0, 1)]
    np.testing.assert_array_equal(splits[0].test.labels, splits[1].test.labels)
    assert loading.source(Config(seed=0), tasks.get("digits")) == loading.source(
        Config(seed=1), tasks.get("digits")
    )


def test_the_judges_of_a_sorted_split_are_of_every_class():
    labels = np.repeat(np.arange(10), 40)
    split = Split({"row": np.arange(400)}, labels)
    asked = Generation(split.inputs, [str(i) for i in range(400)], list, lambda a, b: {}, (0,), 0, 1)
    whole = Dataset(split, split, split, 10, labels, more_tests={"one": split.take(np.arange(7))})
    few = whole._replace(generation=asked).judged_by(100)
    rows = few.test.inputs["row"]
    assert np.bincount(few.test.labels).min() > 3 and (np.diff(rows) > 0).all() and len(rows) == 100
    np.testing.assert_array_equal(few.test.labels, labels[rows])
    np.testing.assert_array_equal(few.validation.inputs["row"], rows)
    np.testing.assert_array_equal(few.generation.inputs["row"], rows)
    assert few.generation.references == [str(i) for i in rows]
    assert few.more_tests["one"].inputs["row"].tolist() == list(range(7))
    assert whole.judged_by(100).generation is None


def test_a_summary_is_of_the_state_that_was_kept():
    ready = prepare.prepare(Config(method="scaffold", rounds=3, clients=5, local_steps=1))
    history = [{"round": t, "seconds": s} for t, s in enumerate((None, 1.0, 2.0, 9.0))]
    for t, accuracy in ((0, 0.1), (1, 0.5), (3, 0.3)):
        history[t]["accuracy"] = accuracy
    for keep, final, kept in (("best", 0.5, 1), ("last", 0.3, 3)):
        config = dataclasses.replace(ready.config, keep=keep)
        got = results.summary(ready._replace(config=config), history, {})
        assert got["validation"] == {"final": final, "initial": 0.1}
        assert got["kept"] == {"which": keep, "round": kept} and got["seconds_per_round"] == 2.0
    wire = ready.wire._replace(up=1, down=2, optimizer=3, memory=4, catch_up=5)
    got = results.summary(ready._replace(wire=wire), history, {})
    assert got["bytes_per_client_and_round"] == {"up": 1, "down": 2}
    names = ("optimizer_bytes", "client_memory_bytes", "catch_up_bytes_per_missed_round")
    assert [got[name] for name in names] == [3, 4, 5]


def test_a_saved_head_of_other_classes_is_refused(tmp_path):
    config = dataclasses.replace(
        tiny_vit.CONFIG,
        labels=tuple(map(str, range(12))),
        image_size=8,
        patch_size=4,
        num_channels=1,
        image_mean=(0.5,),
        image_std=(0.5,),
    )
    fns = models.configs.family_of(config).build(config)
    models.save(tmp_path, fns, fns.init(jax.random.key(0)))
    with pytest.raises(ValueError, match="has a head for 12 labels, digits has 10"):
        saved.evaluate(Config(model=str(tmp_path)))


def test_a_saved_model_is_judged_by_as_many_samples_as_asked():
    whole, few = (saved.evaluate(Config(model="digits_vit", eval_samples=k)) for k in (None, 30))
    assert whole["loss"] != pytest.approx(few["loss"], rel=1e-3)


def test_a_saved_model_runs_in_the_precision_asked():
    full, half = (saved.evaluate(Config(model="digits_vit", precision=p)) for p in ("float32", "bf16"))
    assert full["loss"] != half["loss"]
