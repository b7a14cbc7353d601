"""The one loop with side effects: trains, evaluates, writes."""

import dataclasses
import pathlib
import platform
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any, NamedTuple

import jax
import numpy as np

from fedgalore_jax import engine, models, tree
from fedgalore_jax.config import Config
from fedgalore_jax.data import Dataset, Split, tokens
from fedgalore_jax.data.federated import OWNERS
from fedgalore_jax.data.partition import owners
from fedgalore_jax.evaluation import generated, personal_metrics, test_metrics
from fedgalore_jax.folder import append_line, claim, write_json
from fedgalore_jax.prepare import (
    BLOCK,
    Model,
    Prepared,
    by_role,
    describe,
    plan,
    prepare,
    start,
)
from fedgalore_jax.progress import Progress, human
from fedgalore_jax.types import Params


class Result(NamedTuple):
    """What a run leaves.

    Attributes:
      params: the global model that was kept.
      history: one dict per round, the lines of `metrics.jsonl`.
      summary: the contents of `summary.json`.
    """

    params: Params
    history: list[dict[str, Any]]
    summary: dict[str, Any]


def run(
    config: Config,
    *,
    model: Model | None = None,
    dataset: Dataset | None = None,
    say: Callable[[str], None] = print,
) -> Result:
    """Runs one federated fine-tuning.

    Args:
      config: what to run. With `out_dir`, the run leaves `config.json`, `metrics.jsonl` (a line as soon as
        a round is read), `model/`, where the method has one `adapter/`, and, last, `summary.json` there.
      model: your own `(fns, params)`, in place of the model that `config.model` names.
      dataset: your own, in place of the one that `config.task` loads.
      say: takes the few lines that describe the run; the live progress line goes to stderr.

    Returns:
      A `Result`.

    Raises:
      ValueError: a value that cannot be used, with its name and the remedy; nothing was written.
      OSError: `out_dir` already holds something, or cannot be written.
      FloatingPointError: the run diverged; the rounds before are written.
    """
    return execute(prepare(config, model=model, dataset=dataset), say=say)


def execute(prepared: Prepared, *, say: Callable[[str], None] = print) -> Result:
    """Trains, judges on the test split, and writes; see `run`."""
    config = prepared.config
    out = claim(pathlib.Path(config.out_dir)) if config.out_dir else None
    if out:
        write_json(out / "config.json", dataclasses.asdict(config))
    say(describe(prepared))
    loop = _Loop(prepared, out)
    state, history = loop.run()
    params = prepared.machine.strategy.export(state.server)
    summary = loop.summary(state, params, history)
    if out:
        save_models(out, prepared, state, params, say)
        write_json(out / "summary.json", summary)
    return Result(params, history, summary)


def save_adapter(path: pathlib.Path, prepared: Prepared, server, params, say: Callable[[str], None]) -> None:
    """Writes what was learned next to the model it began with, where a method leaves that as LoRA factors.

    What the folder cannot hold is named in one line through `say`.
    """
    strategy, base = prepared.machine.strategy, prepared.base
    if strategy.adapter is None or base is None:
        return
    factors, lora_alpha = strategy.adapter(server)
    kernels, head = models.adapter_paths(prepared.fns)
    _, trained, _ = by_role(prepared.config, prepared.task, params)
    if missing := (factors.keys() - kernels) | (trained.keys() - head):
        say(f"adapter/ is without {', '.join(sorted(missing))}: the whole result is in model/")
    kept, flat = {path: factors[path] for path in factors if path in kernels}, tree.flatten(params)
    if kept:
        models.save_adapter(
            path,
            prepared.fns,
            kept,
            base_model=str(base),
            lora_alpha=lora_alpha,
            rank=next(iter(kept.values())).a.shape[-1],
            head={path: flat[path] for path in head},
        )


def save_models(
    out: pathlib.Path, prepared: Prepared, state: engine.RunState, params: Params, say: Callable[[str], None]
) -> None:
    """Writes `model/`, with `adapter/` where the method leaves one; a personalised method's `models/`."""
    strategy, config = prepared.machine.strategy, prepared.config
    found = {out / "model": params}
    if strategy.personal:
        memories = [jax.tree.map(lambda x, c=c: x[c], state.clients) for c in range(config.clients)]
        found = {
            out / "models" / f"client-{c}": strategy.export(state.server, memory)
            for c, memory in enumerate(memories)
        }
    for folder, own in found.items():
        models.save(folder, prepared.fns, own)
        if prepared.base:
            tokens.copy(prepared.base, folder)
    save_adapter(out / "adapter", prepared, state.server, params, say)


def validate(prepared: Prepared) -> float:
    """Trains and returns the final validation metric; neither writes nor looks at the test split."""
    _, history = _Loop(prepared, None).run()
    return history[-1][prepared.task.metric]


class _Loop:
    """The rounds of one run, and what is measured on the way."""

    def __init__(self, prepared: Prepared, out: pathlib.Path | None):
        self.prepared, self.config, self.out = prepared, prepared.config, out
        self.personal, self.evaluator = prepared.machine.strategy.personal, prepared.evaluator
        self.metric = prepared.task.metric
        self.best: Any = None

    def run(self) -> tuple[engine.RunState, list[dict[str, Any]]]:
        """All rounds; the state to keep and the history.

        Block t - 1 is read, evaluated and written while block t computes.
        """
        config, machine = self.config, self.prepared.machine
        history: list[dict[str, Any]] = []
        progress = Progress(config.rounds)
        try:
            state = start(config, machine, self.prepared.params)
            record = {"round": 0} | self.measure(state, self.prepared.dataset.validation)
            self.write(record, history)
            self.best = state if config.keep == "best" else None
            progress.show(0, f"{self.metric} {record[self.metric]:.3f}  compiling")
            rounds_of = self.prepared.compile()
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
        return self.best if config.keep == "best" else state, history

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
                record |= self.measure(state, self.prepared.dataset.validation)
                if record[self.metric] > self.reached(history):
                    self.best = state if self.config.keep == "best" else None
            if wild := [name for name in ("train_loss", "loss") if not np.isfinite(record.get(name, 0))]:
                raise FloatingPointError(
                    f"{wild[0]} is {record[wild[0]]} in round {t + 1}: lower --lr, or set --clip"
                )
            seconds = round((now - began) / len(rounds), 4)
            record |= {"bytes_up": wire.up, "bytes_down": wire.down, "seconds": seconds}
            self.write(record, history)
            latest = next(h[self.metric] for h in reversed(history) if self.metric in h)
            text = f"loss {record['train_loss']:.4f}  {self.metric} {latest:.3f}"
            progress.show(t + 1, f"{text}  {human(wire.up)} up a client")
        return now

    def due(self, done: int) -> bool:
        """Whether to evaluate after `done` rounds."""
        return done % self.config.eval_every == 0 or done == self.config.rounds

    def reached(self, history: list) -> float:
        """The best validation metric so far."""
        return max(h[self.metric] for h in history if self.metric in h)

    def measure(self, state: engine.RunState, split: Split) -> dict[str, float]:
        """The task's metrics on a split: of the global model, or of each client's own on its share."""
        if not self.personal:
            return self.evaluator.metrics(state.server, split)
        parts, classes = self.prepared.federation.parts, self.prepared.dataset.classes
        rng = np.random.default_rng([self.config.seed, OWNERS])
        whose = owners(split.labels, parts, classes, rng)
        return personal_metrics(self.evaluator, state.server, state.clients, split, whose)

    def write(self, record: dict[str, Any], history: list) -> None:
        """Keeps a record, and appends its line."""
        history.append(record)
        if self.out:
            append_line(self.out / "metrics.jsonl", record)

    def summary(self, state: engine.RunState, params: Params, history: list) -> dict[str, Any]:
        """Totals, and the test split's one use."""
        judged = [record for record in history if self.metric in record]
        best = max(judged, key=lambda record: record[self.metric])
        kept = best if self.config.keep == "best" else judged[-1]
        config, wire = self.config, self.prepared.wire
        missed = int(sum(record.get("bytes_catch_up", 0) for record in history))
        fns = self.prepared.fns
        final = test_metrics(
            lambda split: self.measure(state, split),
            lambda generation: generated(fns, params, generation),
            self.prepared.dataset,
        )
        return {
            "method": config.method,
            "metric": self.metric,
            "final": final,
            "validation": {"final": kept[self.metric], "initial": judged[0][self.metric]},
            "best": {"round": best["round"], self.metric: best[self.metric]},
            "kept": {"which": config.keep, "round": kept["round"]},
            "personal": self.personal,
            "rounds": config.rounds,
            "bytes_per_client_and_round": {"up": wire.up, "down": wire.down},
            "bytes_total": config.rounds * config.participants * (wire.up + wire.down) + missed,
            "bytes_catch_up": missed,
            "optimizer_bytes": wire.optimizer,
            "client_memory_bytes": wire.memory,
            "catch_up_bytes_per_missed_round": wire.catch_up,
            "gradients_per_step": wire.gradients,
            "seconds_per_round": float(np.median([record["seconds"] for record in history[1:]])),
            "device": f"{jax.devices()[0].device_kind} x {jax.device_count()}",
            "versions": {"python": platform.python_version()}
            | {name: metadata.version(name) for name in ("jax", "flax", "optax", "numpy")},
        }
