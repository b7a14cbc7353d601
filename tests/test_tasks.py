"""The table of tasks, their losses and metrics against references."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as reference

from fedgalore_jax import metrics, tasks
from fedgalore_jax.data import Source

RNG = np.random.default_rng(0)
LOGITS, LABELS = RNG.normal(size=(60, 2)), RNG.integers(0, 2, 60)


@pytest.mark.parametrize("name", tasks.names())
def test_a_task_measures_its_primary_metric_from_its_outputs(name):
    task = tasks.get(name)
    sequence = task.train == ""
    shape = (4, 6, 5) if sequence else (4, 1) if task.metric == "pearson" else (4, 2)
    labels = np.array(RNG.integers(0, 2, (4, 6) if sequence else 4))
    labels = labels.astype(np.float32) if task.metric == "pearson" else labels
    batch = {"labels": jnp.array(labels), "weight": jnp.ones(4)}
    logits = jnp.array(RNG.normal(size=shape), jnp.bfloat16)
    outputs = np.asarray(task.outputs(logits, batch).astype(jnp.float32))
    assert len(outputs) == 4 and outputs.size <= 12
    measured = task.metrics(outputs, labels)
    assert {task.metric, "loss"} <= set(measured)
    loss = task.loss(logits, batch)
    assert loss.dtype == jnp.float32
    assert float(loss) == pytest.approx(measured["loss"], rel=1e-5)


@pytest.mark.parametrize("loss", [tasks.cross_entropy, tasks.squared_error, tasks.answer_loss])
def test_a_padding_sample_has_no_gradient_and_no_share(loss):
    shape = {tasks.cross_entropy: (3, 4), tasks.squared_error: (3, 1), tasks.answer_loss: (3, 5, 4)}[loss]
    labels = jnp.array(RNG.integers(0, 4, shape[:2] if len(shape) == 3 else 3))
    labels = labels.astype(jnp.float32) if loss is tasks.squared_error else labels
    logits = jnp.array(RNG.normal(size=shape), jnp.float32)
    padded = {"labels": labels, "weight": jnp.array([1.0, 1.0, 0.0])}
    real = {"labels": labels[:2], "weight": jnp.ones(2)}
    value, gradient = jax.value_and_grad(loss)(logits, padded)
    assert float(value) == pytest.approx(float(loss(logits[:2], real)), rel=1e-6)
    assert not np.asarray(gradient[2]).any() and np.asarray(gradient[:2]).any()


def test_scores_agree_with_references():
    guess = LOGITS.argmax(1)
    assert metrics.f1(LOGITS, LABELS)["f1"] == pytest.approx(reference.f1_score(LABELS, guess))
    ours = metrics.matthews(LOGITS, LABELS)["matthews"]
    assert ours == pytest.approx(reference.matthews_corrcoef(LABELS, guess))
    values, targets = RNG.normal(size=50).astype(np.float32), RNG.integers(0, 6, 50) / 2  # with ties
    ours = metrics.regression(values, targets)
    assert ours["pearson"] == pytest.approx(stats.pearsonr(values, targets)[0], rel=1e-5)
    assert ours["spearman"] == pytest.approx(stats.spearmanr(values, targets)[0])


def test_constant_guesses_score_zero():
    constant = np.tile([1.0, 0.0], (60, 1))
    assert metrics.matthews(constant, LABELS)["matthews"] == 0
    assert metrics.f1(constant, LABELS)["f1"] == 0
    assert metrics.regression(np.ones(9), np.arange(9.0))["spearman"] == 0


def test_an_unknown_task_lists_the_others():
    with pytest.raises(ValueError, match="unknown task 'glue/wnli': choose from 20newsgroups"):
        tasks.get("glue/wnli")


@pytest.mark.parametrize(
    "name", ["digits", "digits_domains", "trec", "trec_fine", "20newsgroups", "sentiment", "gsm_symbolic"]
)
def test_a_task_with_its_own_data_takes_no_other(name):
    with pytest.raises(ValueError, match="data='mine': this task has its own data"):
        tasks.get(name).load(Source(pathlib.Path("nowhere"), "mine"))
