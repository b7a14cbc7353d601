"""The one loop with side effects: loads, federates, trains, evaluates, writes."""

import dataclasses
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata, resources
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from fedgalore_jax import engine, models, strategies, tasks, tree
from fedgalore_jax.config import Config
from fedgalore_jax.data import Dataset, FederatedData, Split, partition
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


def run(config: Config, *, say: Callable[[str], None] = print) -> Result:
    """Runs one federated fine-tuning.

    Args:
      config: what to run. With `out_dir`, the run leaves `config.json`, `metrics.jsonl` (a line as soon as
        a round is read), `summary.json` and `model/` there.
      say: takes the few lines that describe the run; the live progress line goes to stderr.

    Returns:
      A `Result`.

    Raises:
      ValueError: a value that cannot be used, with its name and the remedy; nothing was written.
      FileExistsError: `out_dir` already holds something.
    """
    task = tasks.get(config.task)
    strategy = strategy_of(config, task.lr)
    dataset = task.load()
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
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    state = engine.init(strategy, params, key, config.clients)
    out = claim(config.out_dir) if config.out_dir else None
    if out:
        write_json(out / "config.json", dataclasses.asdict(config))
    say(describe(config, dataset, federation))
    say(roles_table(config, params))
    loop = _Loop(config, machine, federation, dataset, task.metrics, out)
    final_state, history = loop.run(state)
    summary = loop.summary(final_state, history)
    final = strategy.export(final_state.server)
    if out:
        write_json(out / "summary.json", summary)
        models.save(out / "model", fns, final)
    return Result(final, history, summary)


class _Loop:
    """The rounds of one run, and what is measured on the way."""

    wire: engine.Wire

    def __init__(self, config, machine, federation, dataset: Dataset, metrics, out):
        self.config, self.machine, self.federation = config, machine, federation
        self.dataset, self.metrics, self.out = dataset, metrics, out
        self.rounds, self.logits = machine.compile()

    def run(self, state: engine.RunState) -> tuple[engine.RunState, list[dict[str, Any]]]:
        """All rounds. Block t - 1 is read, evaluated and written while block t computes."""
        config, history = self.config, []
        block = min(config.eval_every, BLOCK)
        progress = Progress(config.rounds)
        self.wire = self.machine.wire(state, self.plan(range(1), 1))
        record = {"round": 0} | self.evaluate(state, self.dataset.validation)
        self.write(record, history)
        progress.show(0, f"accuracy {record['accuracy']:.3f}  compiling")
        try:
            began, pending = time.perf_counter(), None
            for rounds in self.blocks():
                plan = self.plan(rounds, block)
                state, rows = self.rounds(state, self.machine.train, plan, len(rounds))
                if pending is not None:
                    began = self.read(*pending, began, history, progress)
                pending = (rounds, rows, state)
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

    def plan(self, rounds: range, size: int):
        """The plan of some rounds, padded to `size` rows so that every call has the same shapes."""
        config = self.config
        plan = self.federation.plan(
            rounds,
            config.cohort or config.clients,
            config.local_steps,
            config.batch_size,
            self.machine.chunk,
        )
        return jax.tree.map(lambda x: np.resize(x, (size, *x.shape[1:])), plan)

    def read(self, rounds: range, rows, state, began: float, history, progress) -> float:
        """Waits for a block, evaluates after it where that is due, and writes its lines."""
        rows = jax.device_get(rows)
        now = time.perf_counter()
        for i, t in enumerate(rounds):
            record: dict[str, Any] = {"round": t + 1}
            record |= {name: value[i].tolist() for name, value in rows.items()}
            if not np.isfinite(record["train_loss"]):
                raise FloatingPointError(
                    f"train_loss is {record['train_loss']} in round {t + 1}: lower --lr or set --clip"
                )
            if t + 1 == rounds.stop and self.due(t + 1):
                record |= self.evaluate(state, self.dataset.validation)
            record |= {
                "bytes_up": self.wire.up,
                "bytes_down": self.wire.down,
                "seconds": round((now - began) / len(rounds), 4),
            }
            self.write(record, history)
            shown = next((h for h in reversed(history) if "accuracy" in h), None)
            text = f"loss {record['train_loss']:.4f}"
            text += f"  accuracy {shown['accuracy']:.3f}" if shown else ""
            progress.show(t + 1, f"{text}  {human(self.wire.up)} up a client")
        return now

    def due(self, done: int) -> bool:
        """Whether to evaluate after `done` rounds."""
        return done % self.config.eval_every == 0 or done == self.config.rounds

    def evaluate(self, state: engine.RunState, split: Split) -> dict[str, float]:
        """The task's metrics of the global model on a split."""
        inputs = engine.in_batches(split.inputs, EVAL_BATCH)
        logits = np.asarray(self.logits(state.server, inputs))
        return self.metrics(logits.reshape(-1, *logits.shape[2:])[: len(split.labels)], split.labels)

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
        timed = [record["seconds"] for record in history[2:]] or [history[-1]["seconds"]]
        cohort = self.config.cohort or self.config.clients
        return {
            "method": self.config.method,
            "final": self.evaluate(state, self.dataset.test),
            "validation": {"final": judged[-1]["accuracy"], "initial": judged[0]["accuracy"]},
            "best": {"round": best["round"], "accuracy": best["accuracy"]},
            "rounds": self.config.rounds,
            "bytes_per_client_and_round": {"up": self.wire.up, "down": self.wire.down},
            "bytes_total": self.config.rounds * cohort * (self.wire.up + self.wire.down),
            "optimizer_bytes": self.wire.optimizer,
            "client_memory_bytes": self.wire.memory,
            "seconds_per_round": float(np.median(timed)),
            "device": f"{jax.devices()[0].device_kind} x {jax.device_count()}",
            "versions": {"python": platform.python_version()}
            | {name: metadata.version(name) for name in ("jax", "flax", "optax", "numpy")},
        }


def check(configs: Sequence[Config]) -> None:
    """Refuses a series of runs, none of which may fail late, before the first begins."""
    for config in configs:
        strategy_of(config, tasks.get(config.task).lr)


def strategy_of(config: Config, tuned: dict[str, float]) -> strategies.Strategy:
    """The strategy that a config names, with its options."""
    given = dict(config.opt)
    if config.client_weights is not None:
        given["client_weights"] = config.client_weights
    lr = config.lr if config.lr is not None else tuned.get(config.method)
    if lr is None:
        raise ValueError(f"no learning rate is tuned for {config.method} on {config.task}: give lr")
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
    return strategies.build(config.method, **(common | given))


def federate(config: Config, dataset: Dataset) -> FederatedData:
    """Splits the training set over the clients."""
    rng = np.random.default_rng([config.seed, PARTITION])
    parts = partition(
        dataset.train.labels, config.clients, kind=config.partition, alpha=config.alpha, rng=rng
    )
    return FederatedData(parts, config.seed)


def model(config: Config, task: tasks.Task, dataset: Dataset) -> tuple[models.ModelFns, Params]:
    """The model that a config names, with a head for the task."""
    return models.load(
        model_path(config.model or task.model),
        num_labels=dataset.num_labels,
        new_head=config.new_head,
        dropout=config.dropout,
        key=jax.random.fold_in(jax.random.key(config.seed), 0),
    )


def model_path(name: str) -> pathlib.Path:
    """A model directory: one that the package ships, by name, or any other by path."""
    shipped = resources.files("fedgalore_jax.models").joinpath(name)
    return pathlib.Path(str(shipped)) if shipped.is_dir() else pathlib.Path(name)


def claim(out_dir: str) -> pathlib.Path:
    """Makes the run's folder; one that holds anything is refused."""
    path = pathlib.Path(out_dir)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"out_dir={out_dir!r} is in use: choose a new folder")
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK):
        raise PermissionError(f"out_dir={out_dir!r} is not writable: choose another folder")
    return path


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def describe(config: Config, dataset: Dataset, federation: FederatedData) -> str:
    """The run in one line."""
    sizes = sorted(len(part) for part in federation.parts)
    labels = [len(np.unique(dataset.train.labels[part])) for part in federation.parts]
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
