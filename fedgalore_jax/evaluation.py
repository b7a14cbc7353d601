"""What a model is worth on a split: outputs reduced on the device, metrics from all of them at once."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedgalore_jax import models, placement, tree
from fedgalore_jax.data import Dataset, Generation, Split, split_by_length
from fedgalore_jax.tasks import Task
from fedgalore_jax.types import Params

GENERATE_BATCH = 32
"""Prompts answered at a time."""
AT_ONCE = 1 << 30
"""Bytes of a split that the devices are given at a time."""


class Evaluator(NamedTuple):
    """A task's outputs as a program; shapes are compiled once each, so a run evaluates at no further cost.

    Attributes:
      program: jitted, `(state, batches [n, B, ...]) -> outputs [n, B, ...]`.
      task: whose metrics are meant.
      batch: B, a multiple of the clients axis of the mesh.
      mesh: what each batch is spread over; a device is given its share alone.
    """

    program: Callable[[Any, dict[str, Any]], Any]
    task: Task
    batch: int
    mesh: placement.Mesh | None

    def outputs(self, state: Any, split: Split) -> np.ndarray:
        """The task's outputs of every sample, `[n, ...]`, in the split's order."""
        spread = placement.along(self.mesh, 1)
        rows, parts = [], []
        for where, part in split_by_length(split):
            each, outs = tree.nbytes(part.arrays) // len(part.labels) * self.batch, []
            for batches in in_batches(where, self.batch, max(1, AT_ONCE // each)):
                given = {name: placement.rows(x, batches, spread) for name, x in part.arrays.items()}
                outs.append(np.asarray(self.program(state, given)))
            out = np.concatenate(outs)
            parts.append(out.reshape(-1, *out.shape[2:])[: len(where)])
            rows.append(where)
        outputs = np.concatenate(parts)
        return outputs[np.argsort(np.concatenate(rows))]

    def metrics(self, state: Any, split: Split) -> dict[str, float]:
        """The task's metrics on a split."""
        return self.task.metrics(self.outputs(state, split), split.labels)


def evaluator(
    task: Task,
    fns: models.ModelFns,
    export: Callable[[Any], Params] = lambda p: p,
    mesh: placement.Mesh | None = None,
) -> Evaluator:
    """Binds a task to a model.

    Args:
      task: what is measured.
      fns: the model.
      export: from what `Evaluator` is called with to parameters; a strategy's, for a server's state.
      mesh: what a batch is spread over.
    """

    def one(params, batch):
        batch = placement.over_clients({name: jnp.asarray(x) for name, x in batch.items()})
        return task.outputs(fns.apply(params, batch), batch)

    def outputs(state, batches):
        with placement.on(mesh):
            return placement.everywhere(jax.lax.map(partial(one, export(state)), batches))

    shares = placement.shares(mesh)
    return Evaluator(jax.jit(outputs), task, -(-task.eval_batch // shares) * shares, mesh)


def in_batches(rows: np.ndarray, batch_size: int, most: int) -> np.ndarray:
    """Cuts numbers of rows into calls of so many batches at most, filled up from the start.

    Returns:
      `[calls, batches, B]`.

    >>> in_batches(np.arange(5), 2, 2).tolist()
    [[[0, 1], [2, 3]], [[4, 0], [1, 2]]]
    """
    batches = -(-len(rows) // batch_size)
    calls = -(-batches // most)
    return np.resize(rows, (calls, -(-batches // calls), batch_size))


def personal_metrics(
    evaluator: Evaluator, server: Any, clients: Any, split: Split, owners: np.ndarray
) -> dict[str, float]:
    """The task's metrics where every sample is answered by its own client's model.

    Args:
      evaluator: called with `(server, memory of one client)`.
      server: the strategy's state.
      clients: all clients' memories, rows `[N, ...]`.
      split: what is asked.
      owners: `[n]`, whose each sample is.
    """
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for client in np.unique(owners):
        rows = np.flatnonzero(owners == client)
        memory = jax.tree.map(lambda x, client=client: x[client], clients)
        found.append((rows, evaluator.outputs((server, memory), split.take(rows))))
    rows, outputs = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return evaluator.task.metrics(outputs[np.argsort(rows)], split.labels)


def test_metrics(
    measure: Callable[[Split], dict[str, float]], answer: Callable[[Generation], list[str]], dataset: Dataset
) -> dict[str, float]:
    """Everything a data set tests: its test split, further ones by name, and generated answers.

    Args:
      measure: a model's metrics on a split.
      answer: the model's answers.
      dataset: whose tests are meant.
    """
    scores = measure(dataset.test)
    for name, split in dataset.more_tests.items():
        scores |= {f"{name}/{key}": value for key, value in measure(split).items()}
    if dataset.generation:
        scores |= dataset.generation.score(answer(dataset.generation), dataset.generation.references)
    return scores


def generated(fns: models.ModelFns, params: Params, generation: Generation) -> list[str]:
    """Greedy answers to all prompts, as texts."""
    texts: list[str] = []
    for rows in in_batches(np.arange(len(generation.references)), GENERATE_BATCH, 1):
        tokens = models.generate(
            fns,
            params,
            {name: jnp.asarray(x[rows[0]]) for name, x in generation.inputs.items()},
            max_new_tokens=generation.max_new_tokens,
            eos=generation.eos,
            pad=generation.pad,
        )
        texts += generation.decode(np.asarray(tokens))
    return texts[: len(generation.references)]
