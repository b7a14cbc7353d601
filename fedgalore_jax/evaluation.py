"""What a model is worth on a split: outputs reduced on the device, metrics from all of them at once."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedgalore_jax import models
from fedgalore_jax.data import Dataset, Generation, Split, split_by_length
from fedgalore_jax.tasks import Task
from fedgalore_jax.types import Params

GENERATE_BATCH = 32
"""Prompts answered at a time."""


class Evaluator(NamedTuple):
    """A task's outputs as a program; shapes are compiled once each, so a run evaluates at no further cost.

    Attributes:
      program: jitted, `(state, batches [n, B, ...]) -> outputs [n, B, ...]`.
      task: whose metrics are meant.
    """

    program: Callable[[Any, dict[str, np.ndarray]], Any]
    task: Task

    def outputs(self, state: Any, split: Split) -> np.ndarray:
        """The task's outputs of every sample, `[n, ...]`, in the split's order."""
        rows, parts = [], []
        for where, part in split_by_length(split):
            batches = in_batches(part.inputs | {"labels": part.labels}, self.task.eval_batch)
            out = np.asarray(self.program(state, batches))
            parts.append(out.reshape(-1, *out.shape[2:])[: len(where)])
            rows.append(where)
        outputs = np.concatenate(parts)
        return outputs[np.argsort(np.concatenate(rows))]

    def metrics(self, state: Any, split: Split) -> dict[str, float]:
        """The task's metrics on a split."""
        return self.task.metrics(self.outputs(state, split), split.labels)


def evaluator(task: Task, fns: models.ModelFns, export: Callable[[Any], Params] = lambda p: p) -> Evaluator:
    """Binds a task to a model.

    Args:
      task: what is measured.
      fns: the model.
      export: from what `Evaluator` is called with to parameters; a strategy's, for a server's state.
    """

    def one(params, batch):
        batch = {name: jnp.asarray(x) for name, x in batch.items()}
        return task.outputs(fns.apply(params, batch), batch)

    return Evaluator(jax.jit(lambda state, batches: jax.lax.map(partial(one, export(state)), batches)), task)


def in_batches(inputs: Mapping[str, np.ndarray], batch_size: int) -> dict[str, np.ndarray]:
    """Cuts `[n, ...]` into `[batches, B, ...]`, the last batch filled up with the first samples."""

    def cut(x):
        size = min(batch_size, len(x))
        batches = -(-len(x) // size)
        return np.resize(x, (batches * size, *x.shape[1:])).reshape(batches, size, *x.shape[1:])

    return {name: cut(x) for name, x in inputs.items()}


def test_metrics(
    evaluator: Evaluator, state: Any, dataset: Dataset, fns: models.ModelFns, params: Params
) -> dict[str, float]:
    """Everything a data set tests: its test split, further ones by name, and generated answers.

    Args:
      evaluator: of the task.
      state: what the evaluator is called with.
      dataset: whose tests are meant.
      fns, params: the model, for generation.
    """
    scores = evaluator.metrics(state, dataset.test)
    for name, split in dataset.more_tests.items():
        scores |= {f"{name}/{key}": value for key, value in evaluator.metrics(state, split).items()}
    if dataset.generation:
        texts = generated(fns, params, dataset.generation)
        scores |= dataset.generation.score(texts, dataset.generation.references)
    return scores


def generated(fns: models.ModelFns, params: Params, generation: Generation) -> list[str]:
    """Greedy answers to all prompts, as texts."""
    texts: list[str] = []
    batches = in_batches(generation.inputs, GENERATE_BATCH)
    for i in range(len(batches["input_ids"])):
        tokens = models.generate(
            fns,
            params,
            {name: jnp.asarray(x[i]) for name, x in batches.items()},
            max_new_tokens=generation.max_new_tokens,
            eos=generation.eos,
            pad=generation.pad,
        )
        texts += generation.decode(np.asarray(tokens))
    return texts[: len(generation.references)]
