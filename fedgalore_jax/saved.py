"""What a saved model is good for: its metrics on a task's test split, its answers to new data."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from fedgalore_jax import models, tasks
from fedgalore_jax.config import Config
from fedgalore_jax.data import Generation
from fedgalore_jax.evaluation import evaluator, generated, test_metrics
from fedgalore_jax.loading import Model, judged, load_data, model_path, source, with_classes


def evaluate(config: Config, *, say: Callable[[str], None] = print) -> dict[str, float]:
    """The task's metrics of the model that `config.model` names, as it is, on the test split.

    Args:
      config: names the task and the model.
      say: takes a line for whatever was left out or cut of the data.

    Raises:
      ValueError: the model has no head for the task's labels.
    """
    task = tasks.get(config.task)
    dataset = judged(config, load_data(config, task))
    for note in dataset.notes:
        say(note)
    fns, params = _as_saved(config, task, dataset.num_labels)
    fns = with_classes(fns, dataset, drawn=False)
    asked = evaluator(task, fns)
    return test_metrics(
        lambda split: asked.metrics(params, split),
        lambda generation: generated(fns, params, generation),
        dataset,
    )


def predict(config: Config, file: str, *, say: Callable[[str], None] = print) -> Iterator[dict[str, Any]]:
    """The model's answer to every sample of a file, in its order.

    Args:
      config: names the task and the model; `text_column` says what is read.
      file: for texts a csv, jsonl or parquet file, for images a folder, for prompts a jsonl file.
      say: takes a line for whatever was cut of them.

    Yields:
      The `sample` (its row, or its file) and the `label` and `score` of the best class, the `value` of a
      regression, or the `answer` of a language model.
    """
    task = tasks.get(config.task)
    names, asked, notes = task.read(source(config, task), file)
    for note in notes:
        say(note)
    fns, params = _as_saved(config, task, 1 if task.regresses else None)
    if isinstance(asked, Generation):
        answers = generated(fns, params, asked)
        yield from ({"sample": n, "answer": text} for n, text in zip(names, answers, strict=True))
        return
    outputs = evaluator(task, fns).outputs(params, asked)
    if outputs.ndim == 1 or outputs.shape[1] == 1:
        values = outputs.reshape(-1).tolist()
        yield from ({"sample": n, "value": value} for n, value in zip(names, values, strict=True))
        return
    for n, row in zip(names, np.asarray(jax.nn.softmax(outputs, -1)), strict=True):
        best = int(row.argmax())
        yield {"sample": n, "label": fns.config.labels[best], "score": round(float(row[best]), 6)}


def _as_saved(config: Config, task: tasks.Task, num_labels: int | None) -> Model:
    """The model with the head it was saved with."""
    path = model_path(config, task)
    fns, params = models.load(path, precision=config.precision, scan_layers=config.scan_layers)
    has = len(getattr(fns.config, "labels", ())) or None
    if num_labels is not None and has is not None and has != num_labels:
        raise ValueError(f"model={str(path)!r} has a head for {has} labels, {config.task} has {num_labels}")
    return fns, params
