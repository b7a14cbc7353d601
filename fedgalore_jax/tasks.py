"""Tasks by name: a data set, the model that is fine-tuned on it, a loss and the metric."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from fedgalore_jax import metrics
from fedgalore_jax.data import Dataset, digits
from fedgalore_jax.types import Array, Batch


class Task(NamedTuple):
    """What is learned.

    Attributes:
      load: reads the data.
      model: the default of `--model`, a directory in Hugging Face's layout or a model the package ships.
      loss: `(logits, batch) -> scalar`, a mean over the samples with weight 1.
      metrics: `(logits, labels) -> {name: value}`, computed from a whole split at once.
      lr: learning rates tuned on the validation split, by method, with the default model.
    """

    load: Callable[[], Dataset]
    model: str
    loss: Callable[[Array, Batch], Array]
    metrics: Callable[[np.ndarray, np.ndarray], dict[str, float]]
    lr: dict[str, float]


def cross_entropy(logits: Array, batch: Batch) -> Array:
    """Mean cross-entropy over the real samples of a batch.

    Args:
      logits: `[B, classes]`.
      batch: with `labels [B]` and `weight [B]`, 0 for padding.

    Returns:
      A scalar in nats, in float32 or better.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return (losses * batch["weight"]).sum() / jnp.maximum(batch["weight"].sum(), 1)


_TASKS = {
    "digits": Task(
        digits.load,
        "digits_vit",
        cross_entropy,
        metrics.classification,
        lr={"fedavg": 1e-3, "fedgalore": 1e-2, "fedit": 3e-3},
    ),
}


def names() -> tuple[str, ...]:
    """All tasks' names, sorted."""
    return tuple(sorted(_TASKS))


def get(name: str) -> Task:
    """The task of that name; an unknown one is a ValueError that lists the accepted ones."""
    if name not in _TASKS:
        raise ValueError(f"unknown task {name!r}: choose from {', '.join(names())}")
    return _TASKS[name]
