"""Tasks by name: a data set, the model that is fine-tuned on it, a loss and the metrics."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from fedgalore_jax import metrics, tree
from fedgalore_jax.data import (
    IGNORE,
    Asked,
    Dataset,
    Source,
    corpora,
    digits,
    glue,
    images,
    sft,
    text,
    word_problems,
)
from fedgalore_jax.types import Array, Batch

Metrics = Callable[[np.ndarray, Any], dict[str, float]]


class Task(NamedTuple):
    """What is learned.

    Attributes:
      load: reads the data, tokenised or resized for the model that the source names.
      model: the default of `--model`, a name or a directory; None where one must be given.
      loss: `(logits, batch) -> scalar`, a mean over the samples with weight 1 (their answer tokens, in sft).
      outputs: `(logits, batch) -> [B, ...]`, what `metrics` needs of a batch, reduced on the device.
      metrics: `(outputs [n, ...], labels) -> {name: value}`, computed from a whole split at once.
      metric: the name of the one to select by; larger is better.
      lr: learning rates tuned on the validation split, by method, with the default model.
      train: path regexes of the leaves that every method trains plainly, comma-separated.
      read: `(source, file) -> Asked`, what a user wants to know of a trained model.
      eval_batch: samples evaluated at a time.
    """

    load: Callable[[Source], Dataset]
    model: str | None
    loss: Callable[[Array, Batch], Array]
    outputs: Callable[[Array, Batch], Array]
    metrics: Metrics
    metric: str
    lr: dict[str, float]
    train: str
    read: Callable[[Source, str], Asked]
    eval_batch: int = 256

    @property
    def answers(self) -> bool:
        """Whether a language model answers; other tasks need a classifier."""
        return self.outputs is answer_outputs

    @property
    def regresses(self) -> bool:
        """Whether a classifier's one output is the answer."""
        return self.outputs is _value


def cross_entropy(logits: Array, batch: Batch) -> Array:
    """Mean cross-entropy over the real samples of a batch.

    Args:
      logits: `[B, classes]`.
      batch: with `labels [B]` and `weight [B]`, 0 for padding.

    Returns:
      A scalar in nats, in float32 or better.
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(tree.wide(logits), batch["labels"])
    return _mean(losses, batch["weight"])


def squared_error(logits: Array, batch: Batch) -> Array:
    """Mean squared error of `logits [B, 1]` over the real samples of a batch."""
    return _mean((tree.wide(logits)[:, 0] - batch["labels"]) ** 2, batch["weight"])


def answer_loss(logits: Array, batch: Batch) -> Array:
    """Mean next-token cross-entropy over the answer tokens of a batch's real samples.

    Args:
      logits: `[B, L, V]`; position i predicts token i + 1.
      batch: with `labels [B, L]` (`IGNORE` outside the answer) and `weight [B]`.
    """
    nll, count, _ = jnp.moveaxis(answer_outputs(logits, batch), -1, 0)
    weight = batch["weight"]
    return (nll * weight).sum() / jnp.maximum((count * weight).sum(), 1)


def answer_outputs(logits: Array, batch: Batch) -> Array:
    """`[B, 3]` float32: each sample's summed nats, answer tokens, and answer tokens predicted right."""
    logits, labels = tree.wide(logits[:, :-1]), batch["labels"][:, 1:]
    real = labels != IGNORE
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(real, labels, 0))
    right = (logits.argmax(-1) == labels) & real
    sums = ((losses * real).sum(-1), real.sum(-1), right.sum(-1))
    return jnp.stack([x.astype(losses.dtype) for x in sums], -1)


def _logits(logits: Array, batch: Batch) -> Array:
    del batch
    return logits


def _value(logits: Array, batch: Batch) -> Array:
    del batch
    return tree.wide(logits)[:, 0]


def _mean(losses: Array, weight: Array) -> Array:
    return (losses * weight).sum() / jnp.maximum(weight.sum(), 1)


def _own(load: Callable[[Source], Dataset]) -> Callable[[Source], Dataset]:
    """A loader of data that the task brings itself: `--data` would have no effect."""

    def loader(source: Source) -> Dataset:
        if source.data is not None:
            raise ValueError(f"data={source.data!r}: this task has its own data; use text, images or sft")
        return load(source)

    return loader


def _digits(load: Callable[[], Dataset]) -> Callable[[Source], Dataset]:
    """A loader of images that are 8 x 8, for models that read such."""

    def loader(source: Source) -> Dataset:
        size, channels = images.model_input(source.model)
        if (size, channels) != (8, 1):
            raise ValueError(
                f"{source.model} reads {size} x {size} pixels in {channels} channels, and digits are 8 x 8 in"
                " one: choose another model, or the task images"
            )
        return load()

    return _own(loader)


def _text(
    load,
    metric: str = "accuracy",
    measure: Metrics = metrics.classification,
    lr: dict[str, float] | None = None,
) -> Task:
    train = "(pooler|classifier)/"
    return Task(load, "minilm", cross_entropy, _logits, measure, metric, lr or {}, train, text.read)


def _regression(load) -> Task:
    task = _text(load, "pearson", metrics.regression)
    return task._replace(loss=squared_error, outputs=_value)


def _image(load, model: str | None = None, lr: dict[str, float] | None = None) -> Task:
    measure = metrics.classification
    return Task(
        load, model, cross_entropy, _logits, measure, "accuracy", lr or {}, "classifier/", images.read
    )


def _answers(load, lr: dict[str, float] | None = None) -> Task:
    measure, metric = metrics.answers, "token_accuracy"
    # Logits of a whole vocabulary at every position: few samples at a time.
    return Task(load, "smollm2", answer_loss, answer_outputs, measure, metric, lr or {}, "", sft.read, 8)


_SCORES = {"cola": ("matthews", metrics.matthews), "mrpc": ("f1", metrics.f1), "qqp": ("f1", metrics.f1)}
# Found as the presets of the same name say (experiments/configs); on digits as digits_all.cfg does.
_DIGITS_LR = {
    "adel_fl": 1e-3,
    "dual_adapter": 3e-3,
    "fedadamw": 1e-3,
    "fedavg": 1e-3,
    "feddyn": 0.1,
    "fedex_lora": 3e-3,
    "fedgalore": 1e-2,
    "fedglomo": 9e-3,
    "fedit": 3e-3,
    "fedlada": 1e-3,
    "fedlore": 1e-2,
    "fedopt": 0.3,
    "fedprox": 1e-3,
    "fedsa_lora": 3e-3,
    "fedslop": 0.3,
    "fedsmoo": 0.1,
    "fedzmg": 0.1,
    "ffa_lora": 1e-2,
    "flexlora": 3e-3,
    "flora": 3e-3,
    "fr_lora": 3e-3,
    "galore_avg": 1e-2,
    "hetlora": 1e-2,
    "ilora": 9e-4,
    "lora_a2": 3e-3,
    "lora_fair": 3e-3,
    "rolora": 1e-2,
    "scaffold": 3e-2,
    "ssf": 0.3,
}
_TASKS = {
    "digits": _image(_digits(digits.load), "digits_vit", _DIGITS_LR),
    "digits_domains": _image(_digits(digits.domains), "digits_vit", {"fedgalore": 1e-2}),
    "cifar10": _image(functools.partial(images.cifar, "cifar10")),
    "cifar100": _image(functools.partial(images.cifar, "cifar100")),
    "domainnet": _image(images.domainnet),
    "images": _image(images.load),
    "trec": _text(_own(corpora.trec), lr={"fedgalore": 8e-3}),
    "trec_fine": _text(
        _own(functools.partial(corpora.trec, fine=True)),
        lr={"fedavg": 3e-4, "fedgalore": 8e-3, "fedit": 3e-3},
    ),
    "20newsgroups": _text(_own(corpora.newsgroups)),
    "sentiment": _text(_own(corpora.sentiment)),
    "text": _text(text.load),
    "sft": _answers(sft.load),
    "metamath": _answers(word_problems.metamath),
    "gsm_symbolic": _answers(_own(word_problems.gsm_symbolic), {"fedgalore": 6e-3}),
    "glue/stsb": _regression(functools.partial(glue.load, "stsb")),
    **{
        f"glue/{name}": _text(
            functools.partial(glue.load, name), *_SCORES.get(name, ("accuracy", metrics.classification))
        )
        for name in glue.TASKS
        if name != "stsb"
    },
}


def names() -> tuple[str, ...]:
    """All tasks' names, sorted."""
    return tuple(sorted(_TASKS))


def get(name: str) -> Task:
    """The task of that name; an unknown one is a ValueError that lists the accepted ones."""
    if name not in _TASKS:
        raise ValueError(f"unknown task {name!r}: choose from {', '.join(names())}")
    return _TASKS[name]
