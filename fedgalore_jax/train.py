"""The one loop with side effects: loads, federates, trains, evaluates, writes."""

import dataclasses
import json
import math
import os
import pathlib
import platform
import time
from collections.abc import Callable, Iterator
from importlib import metadata, resources
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from fedgalore_jax import engine, models, strategies, tasks, tree
from fedgalore_jax.config import Config
from fedgalore_jax.data import Dataset, FederatedData, Plan, Source, Split, partition
from fedgalore_jax.data.federated import PARTITION
from fedgalore_jax.progress import Progress, human
from fedgalore_jax.strategies.base import ROLES, Common
from fedgalore_jax.types import Params

EVAL_BATCH = 256
BLOCK = 50
"""Most rounds in one compiled call."""


class Result(NamedTuple):
    """What a run leaves.

    Attributes:
      params: the final global model.
      history: one dict per round, the lines of `metrics.jsonl`.
      summary: the contents of `summary.json`.
    """

    params: Params
    history: list[dict[str, Any]]
    summary: dict[str, Any]


class Prepared(NamedTuple):
    """A run that has been found sound: loaded, split and traced, with nothing compiled or written.

    Attributes:
      config: of the run.
      task, dataset, federation: what is learned, by whom.
      fns, params: the model before round 0.
      machine: the engine.
      program: its rounds, lowered and ready to be compiled.
      wire: bytes of one client.
    """

    config: Config
    task: tasks.Task
    dataset: Dataset
    federation: FederatedData
    fns: models.ModelFns
    params: Params
    machine: engine.Engine
    program: Any
    wire: engine.Wire


def run(config: Config, *, say: Callable[[str], None] = print) -> Result:
    """Runs one federated fine-tuning.

    Args:
      config: what to run. With `out_dir`, the run leaves `config.json`, `metrics.jsonl` (a line as soon as
        a round is read), `model/` and, last, `summary.json` there.
      say: takes the few lines that describe the run; the live progress line goes to stderr.

    Returns:
      A `Result`.

    Raises:
      ValueError: a value that cannot be used, with its name and the remedy; nothing was written.
      OSError: `out_dir` already holds something, or cannot be written.
      FloatingPointError: the run diverged; the rounds before are written.
    """
    return execute(prepare(config), say=say)


def prepare(config: Config) -> Prepared:
    """Everything that can fail for a bad configuration, before anything is compiled or written.

    Raises:
      ValueError, OSError: as `run`.
    """
    if config.out_dir:
        refuse_used(pathlib.Path(config.out_dir))
    task = tasks.get(config.task)
    strategy = strategy_of(config, task.lr)
    dataset = task.load(source(config, task))
    federation = federate(config, dataset)
    fns, params = model(config, task, dataset)
    cohort = config.cohort or config.clients
    machine = engine.Engine(
        strategy,
        lambda params, batch, key: task.loss(fns.apply(params, batch, key=key), batch),
        fns.apply,
        engine.on_device(dataset.train),
        config.clients,
        config.local_steps,
        min(config.chunk or cohort, cohort),
    )
    state = jax.eval_shape(lambda: start(config, machine, params))
    rows = plan(config, machine, federation, range(min(config.eval_every, BLOCK, config.rounds)))
    program = machine.programs()[0].lower(state, machine.train, rows, 1)
    wire = machine.wire(state, rows)
    return Prepared(config, task, dataset, federation, fns, params, machine, program, wire)


def execute(prepared: Prepared, *, say: Callable[[str], None] = print) -> Result:
    """Trains, judges on the test split, and writes; see `run`."""
    config = prepared.config
    out = _claim(pathlib.Path(config.out_dir)) if config.out_dir else None
    if out:
        write_json(out / "config.json", dataclasses.asdict(config))
    say(describe(prepared))
    say(roles_table(config, prepared.params))
    loop = _Loop(prepared, out)
    state, history = loop.run()
    summary = loop.summary(state, history)
    final = prepared.machine.strategy.export(state.server)
    if out:
        models.save(out / "model", prepared.fns, final)
        write_json(out / "summary.json", summary)
    return Result(final, history, summary)


def validate(config: Config) -> float:
    """Trains and returns the final validation accuracy; neither writes nor looks at the test split."""
    _, history = _Loop(prepare(config), None).run()
    return history[-1]["accuracy"]


def start(config: Config, machine: engine.Engine, params: Params) -> engine.RunState:
    """The state before round 0."""
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    return engine.init(machine.strategy, params, key, config.clients)


def plan(config: Config, machine: engine.Engine, federation: FederatedData, rounds: range) -> Plan:
    """The plan of some rounds, padded to the rows of a block: every call has the same shapes."""
    cohort = config.cohort or config.clients
    rows = federation.plan(rounds, cohort, config.local_steps, config.batch_size, machine.chunk)
    size = min(config.eval_every, BLOCK, config.rounds)
    return Plan(*(np.resize(field, (size, *field.shape[1:])) for field in rows))


class _Loop:
    """The rounds of one run, and what is measured on the way."""

    def __init__(self, prepared: Prepared, out: pathlib.Path | None):
        self.prepared, self.config, self.out = prepared, prepared.config, out
        self.logits = prepared.machine.programs()[1]

    def run(self) -> tuple[engine.RunState, list[dict[str, Any]]]:
        """All rounds. Block t - 1 is read, evaluated and written while block t computes."""
        config, machine = self.config, self.prepared.machine
        history: list[dict[str, Any]] = []
        progress = Progress(config.rounds)
        try:
            state = start(config, machine, self.prepared.params)
            record = {"round": 0} | self.evaluate(state, self.prepared.dataset.validation)
            self.write(record, history)
            progress.show(0, f"accuracy {record['accuracy']:.3f}  compiling")
            rounds_of = self.prepared.program.compile()
            began, pending = time.perf_counter(), None
            for rounds in self.blocks():
                rows = plan(config, machine, self.prepared.federation, rounds)
                state, metrics = rounds_of(state, machine.train, rows, len(rounds))
                if pending is not None:
                    began = self.read(*pending, began, history, progress)
                pending = (rounds, metrics, state)
            if pending is not None:
                self.read(*pending, began, history, progress)
        finally:
            progress.close()
        return state, history

    def blocks(self) -> Iterator[range]:
        """Consecutive rounds that run in one call: up to the next evaluation, `BLOCK` at most."""
        t, total = 0, self.config.rounds
        while t < total:
            stop = min(t - t % self.config.eval_every + self.config.eval_every, t + BLOCK, total)
            yield range(t, stop)
            t = stop

    def read(self, rounds: range, metrics, state, began: float, history, progress) -> float:
        """Waits for a block, evaluates after it where that is due, and writes its lines."""
        metrics = jax.device_get(metrics)
        now, wire = time.perf_counter(), self.prepared.wire
        for i, t in enumerate(rounds):
            record: dict[str, Any] = {"round": t + 1}
            record |= {name: value[i].tolist() for name, value in metrics.items()}
            if t + 1 == rounds.stop and self.due(t + 1):
                record |= self.evaluate(state, self.prepared.dataset.validation)
            if wild := [name for name in ("train_loss", "loss") if not np.isfinite(record.get(name, 0))]:
                raise FloatingPointError(
                    f"{wild[0]} is {record[wild[0]]} in round {t + 1}: lower --lr, or set --clip"
                )
            seconds = round((now - began) / len(rounds), 4)
            record |= {"bytes_up": wire.up, "bytes_down": wire.down, "seconds": seconds}
            self.write(record, history)
            accuracy = next(h["accuracy"] for h in reversed(history) if "accuracy" in h)
            text = f"loss {record['train_loss']:.4f}  accuracy {accuracy:.3f}"
            progress.show(t + 1, f"{text}  {human(wire.up)} up a client")
        return now

    def due(self, done: int) -> bool:
        """Whether to evaluate after `done` rounds."""
        return done % self.config.eval_every == 0 or done == self.config.rounds

    def evaluate(self, state: engine.RunState, split: Split) -> dict[str, float]:
        """The task's metrics of the global model on a split."""
        inputs = engine.in_batches(split.inputs, EVAL_BATCH)
        logits = np.asarray(self.logits(state.server, inputs))
        logits = logits.reshape(-1, *logits.shape[2:])[: len(split.labels)]
        return self.prepared.task.metrics(logits, split.labels)

    def write(self, record: dict[str, Any], history: list) -> None:
        """Appends one line, whole or not at all."""
        history.append(record)
        if self.out:
            with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def summary(self, state: engine.RunState, history: list) -> dict[str, Any]:
        """Totals, and the test split's one use."""
        judged = [record for record in history if "accuracy" in record]
        best = max(judged, key=lambda record: record["accuracy"])
        config, wire = self.config, self.prepared.wire
        cohort = config.cohort or config.clients
        return {
            "method": config.method,
            "final": self.evaluate(state, self.prepared.dataset.test),
            "validation": {"final": judged[-1]["accuracy"], "initial": judged[0]["accuracy"]},
            "best": {"round": best["round"], "accuracy": best["accuracy"]},
            "rounds": config.rounds,
            "bytes_per_client_and_round": {"up": wire.up, "down": wire.down},
            "bytes_total": config.rounds * cohort * (wire.up + wire.down),
            "optimizer_bytes": wire.optimizer,
            "client_memory_bytes": wire.memory,
            "seconds_per_round": float(np.median([record["seconds"] for record in history[1:]])),
            "device": f"{jax.devices()[0].device_kind} x {jax.device_count()}",
            "versions": {"python": platform.python_version()}
            | {name: metadata.version(name) for name in ("jax", "flax", "optax", "numpy")},
        }


def strategy_of(config: Config, tuned: dict[str, float]) -> strategies.Strategy:
    """The strategy that a config names, with its options."""
    method, given = config.method, dict(config.opt)
    own = strategies.options(method)
    for name, flags in (("roles", "--adapt and --train"), ("head_ratio", "--head_lr")):
        if name in given:
            raise ValueError(f"opt {name}={given[name]!r}: use {flags}")
    if config.client_weights is not None:
        if "client_weights" not in own:
            raise ValueError(
                f"client_weights={config.client_weights!r}: {method} has one form only; where several"
                " methods run, write --opt METHOD.client_weights"
            )
        given["client_weights"] = config.client_weights
    lr = given.pop("lr", config.lr)
    lr = tuned.get(method) if lr is None else lr
    if lr is None:
        raise ValueError(f"no learning rate is tuned for {method} on {config.task}: give --lr")
    if not isinstance(lr, int | float) or not 0 < lr < math.inf:
        raise ValueError(f"lr={lr!r} is not usable: give a positive, finite number")
    steps = config.rounds * config.local_steps
    schedule = {
        "constant": lr,
        "linear": optax.linear_schedule(lr, 0.0, steps),
        "cosine": optax.cosine_decay_schedule(lr, steps),
    }[config.schedule]
    common = {
        "lr": schedule,
        "rank": config.rank,
        "head_ratio": (config.head_lr or lr) / lr,
        "weight_decay": config.weight_decay,
        "clip": config.clip,
        "roles": config.roles(),
    }
    return strategies.build(method, **(common | given))


def federate(config: Config, dataset: Dataset) -> FederatedData:
    """Splits the training set over the clients."""
    rng = np.random.default_rng([config.seed, PARTITION])
    parts = partition(
        dataset.classes,
        config.clients,
        kind=config.partition,
        alpha=config.alpha,
        rng=rng,
        domains=dataset.domains,
    )
    return FederatedData(parts, config.seed)


def source(config: Config, task: tasks.Task) -> Source:
    """What the task's loader is told."""
    return Source(model_path(model_name(config, task)), seed=config.seed)


def model_name(config: Config, task: tasks.Task) -> str:
    """The model of a run: the config's, or the task's."""
    if config.model is None and task.model is None:
        raise ValueError(f"{config.task} has no model of its own: give --model=DIR")
    return config.model or task.model or ""


def model(config: Config, task: tasks.Task, dataset: Dataset) -> tuple[models.ModelFns, Params]:
    """The model that a config names, with a head for the task."""
    return models.load(
        model_path(model_name(config, task)),
        num_labels=dataset.num_labels,
        new_head=config.new_head,
        dropout=config.dropout,
        key=jax.random.fold_in(jax.random.key(config.seed), 0),
    )


def model_path(name: str) -> pathlib.Path:
    """A model directory: one that the package ships, by name, or any other by path."""
    shipped = resources.files("fedgalore_jax.models").joinpath(name)
    return pathlib.Path(str(shipped)) if shipped.is_dir() else pathlib.Path(name)


def refuse_used(path: pathlib.Path) -> None:
    """Raises where a run may not be written: a folder that holds anything, or that cannot be made."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"out_dir={str(path)!r} is in use: choose a new folder")
    parent = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise PermissionError(f"out_dir={str(path)!r} cannot be written: choose another folder")


def _claim(path: pathlib.Path) -> pathlib.Path:
    """Makes the run's folder."""
    refuse_used(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def describe(prepared: Prepared) -> str:
    """The run in one line."""
    config, parts = prepared.config, prepared.federation.parts
    sizes = sorted(len(part) for part in parts)
    labels = [len(np.unique(prepared.dataset.train.labels[part])) for part in parts]
    split = f"{config.partition}({config.alpha:g})" if config.partition == "dirichlet" else "iid"
    return (
        f"{config.task}, {config.method}: {config.cohort or config.clients} of {config.clients} clients"
        f" a round, {split}: {sizes[0]}-{sizes[-1]} samples of {min(labels)}-{max(labels)} classes"
        f" each; {config.rounds} rounds of {config.local_steps} local steps, seed {config.seed}"
    )


def roles_table(config: Config, params: Params) -> str:
    """What is adapted, trained and frozen, one line each."""
    split = Common(1.0, roles=config.roles()).split(tree.flatten(params))
    lines = []
    for role, leaves in zip(ROLES, split, strict=True):
        count = sum(leaf.size for leaf in leaves.values())
        lines.append(f"  {role:<7}{count:>10,} parameters: {', '.join(leaves) or '-'}")
    return "\n".join(lines)
