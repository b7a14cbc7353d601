"""The one loop with side effects: trains, evaluates, writes."""

import contextlib
import dataclasses
import io
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from fedgalore_jax import blocks, engine, hosts, tree
from fedgalore_jax.checkpoint import Checkpoints, abstract
from fedgalore_jax.config import Config
from fedgalore_jax.data import Dataset, Split
from fedgalore_jax.data.federated import OWNERS
from fedgalore_jax.data.partition import owners
from fedgalore_jax.evaluation import generated, personal_metrics, test_metrics
from fedgalore_jax.folder import (
    CONFIG,
    METRICS,
    SUMMARY,
    append_line,
    claim,
    read_json,
    read_lines,
    refuse_used,
    remove_leftovers,
    write_json,
    write_lines,
)
from fedgalore_jax.loading import Model
from fedgalore_jax.plans import plan
from fedgalore_jax.prepare import Prepared, changes, describe, prepare
from fedgalore_jax.progress import Progress, human
from fedgalore_jax.results import best_of, save_models, summary
from fedgalore_jax.types import Params

SELDOM = ("absent", "rejected")
"""Counts of clients that are written where they are not 0."""
HOPELESS = 3
"""Rounds in a row in which every upload was rejected, after which a run gives up."""


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


class Finished(NamedTuple):
    """What a complete run left in its folder.

    Attributes:
      history, summary: as in `Result`.
    """

    history: list[dict[str, Any]]
    summary: dict[str, Any]


class Preempted(Exception):
    """A run was told to end, and did; with an `out_dir`, `resume` goes on with it."""


def lost(record: dict[str, Any]) -> bool:
    """Whether clients sent something in a round, and nothing of it could be used."""
    return "rejected" in record and "train_loss" not in record


def never() -> bool:
    """A run goes on to its end."""
    return False


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
        a round is read), `checkpoints/`, `model/`, where the method has one `adapter/`, and, last,
        `summary.json` there. With `resume` it goes on with the run that is there.
      model: your own `(fns, params)`, in place of the model that `config.model` names.
      dataset: your own, in place of the one that `config.task` loads.
      say: takes the few lines that describe the run; the live progress line goes to stderr.

    Returns:
      A `Result`.

    Raises:
      ValueError: a value that cannot be used, with its name and the remedy; nothing was written.
      OSError: `out_dir` already holds something, is held by another run, or cannot be written.
      FloatingPointError: the run diverged; the rounds before are written.
    """
    return execute(prepare(config, model=model, dataset=dataset), say=say)


def execute(
    prepared: Prepared,
    *,
    say: Callable[[str], None] = print,
    stop: Callable[[], bool] = never,
    draw: Callable[[Result], None] = lambda result: None,
) -> Result:
    """Trains, judges on the test split, and writes; see `run`.

    Args:
      prepared: the run.
      say: takes the few lines that describe it.
      stop: asked after every block of rounds; where it says so the run saves a checkpoint and ends.
      draw: adds to what is in `out_dir` before `summary.json`, the mark of a complete run, is written.

    Raises:
      Preempted: `stop` said so.
    """
    config = prepared.config
    with contextlib.ExitStack() as held:
        out = checkpoints = None
        if config.out_dir:
            out = pathlib.Path(config.out_dir)
            if hosts.first():
                held.enter_context(claim(out, resume=config.resume))
                remove_leftovers(out)
            checkpoints = held.enter_context(Checkpoints(out, config.keep_checkpoints))
        say(describe(prepared))
        loop = _Loop(prepared, out, checkpoints, say, stop)
        state, history = loop.run()
        params = prepared.machine.strategy.export(state.server)
        if hosts.several():
            params = hosts.fetch(params)
        if out and loop.complete:
            return Result(params, history, read_json(out / SUMMARY))
        result = Result(params, history, summary(prepared, history, loop.test(state, params)))
        if out:
            save_models(out, prepared, state, params, say)
        if out and hosts.first():
            draw(result)
            write_json(out / SUMMARY, result.summary)
    return result


def finished(config: Config) -> Finished | None:
    """What is in `out_dir` where `resume` finds a complete run there, and nothing that is to change it.

    Raises:
      ValueError, OSError: the run cannot go on.
    """
    out = pathlib.Path(config.out_dir or "")
    if not config.resume:
        return None
    if hosts.first():
        refuse_used(out, resume=True)
    if not (out / SUMMARY).exists() or changes(config):
        return None
    return Finished(read_lines(out / METRICS), read_json(out / SUMMARY))


def validate(prepared: Prepared) -> float:
    """Trains and returns the final validation metric; neither writes nor looks at the test split."""
    _, history = _Loop(prepared).run()
    return history[-1][prepared.task.metric]


class _Loop:
    """The rounds of one run, and what is measured on the way."""

    def __init__(
        self,
        prepared: Prepared,
        out: pathlib.Path | None = None,
        checkpoints: Checkpoints | None = None,
        say: Callable[[str], None] = print,
        stop: Callable[[], bool] = never,
    ):
        self.prepared, self.config, self.out = prepared, prepared.config, out
        self.checkpoints, self.say, self.stop = checkpoints, say, stop
        self.personal, self.evaluator = prepared.machine.strategy.personal, prepared.evaluator
        self.metric = prepared.task.metric
        self.best: Any = None
        self.complete = False

    def run(self) -> tuple[engine.RunState, list[dict[str, Any]]]:
        """All rounds that are left; the state to keep and the history.

        Block t - 1 is read, evaluated and written while block t computes.
        """
        config, machine = self.config, self.prepared.machine
        state, history = self.start()
        done = history[-1]["round"] if history else 0
        progress = Progress(config.rounds, done, None if hosts.first() else io.StringIO())
        try:
            if not history:
                self.write(
                    {"round": 0} | self.measure(state, self.prepared.loaded.dataset.validation), history
                )
                self.best = tree.apart(state) if config.keep == "best" else None
            if done == config.rounds:
                return self.kept(state), history
            progress.show(done, f"{self.metric} {self.latest(history):.3f}  compiling")
            program, pieces = self.prepared.compile(), self.prepared.blocks
            began, pending = time.perf_counter(), None
            for rounds in self.blocks(done):
                rows = plan(config, machine.chunk, self.prepared.federation, rounds, pieces.rounds)
                if pending is not None and pieces.slots:  # its state is written over
                    began, pending = self.read(*pending, began, history, progress), None
                state, metrics = blocks.advance(program, machine, state, rows, len(rounds), pieces)
                if pending is not None:
                    began = self.read(*pending, began, history, progress)
                absent = [config.participants - np.count_nonzero(counts) for counts in rows.counts]
                pending = (rounds, metrics | {"absent": np.array(absent)}, state)
            if pending is not None:
                self.read(*pending, began, history, progress)
        finally:
            progress.close()
        return self.kept(state), history

    def start(self) -> tuple[engine.RunState, list[dict[str, Any]]]:
        """The state to begin with and the history that led to it; the folder is made to tell the same.

        Lines of `metrics.jsonl` after the checkpoint are dropped; their rounds are computed again, and are
        bit by bit what they were.
        """
        config, out = self.config, self.out
        state = blocks.start(config, self.prepared.machine, self.prepared.loaded.params, self.prepared.blocks)
        if out is None or self.checkpoints is None:
            return state, []
        history, changed, like = read_lines(out / METRICS), changes(config), abstract(state)

        def saved(rounds):
            best = best_of(history[: rounds + 1], self.metric)["round"]
            return {"state": like} | ({"best": like} if config.keep == "best" and best != rounds else {})

        self.complete = (out / SUMMARY).exists() and not changed
        rounds = self.checkpoints.newest(saved, min(len(history) - 1, config.rounds), self.say)
        if self.complete and rounds < config.rounds:
            raise FileExistsError(
                f"out_dir={config.out_dir!r} is complete, but the checkpoint of its last round is gone:"
                " what it learned is in its model/ (or models/)"
            )
        done = history[: rounds + 1] if rounds else []
        hosts.meet("the folder was read")
        if hosts.first():
            if changed:
                (out / SUMMARY).unlink(missing_ok=True)
            write_json(out / CONFIG, dataclasses.asdict(config))
            write_lines(out / METRICS, done)
        if not rounds:
            if history:
                self.say("no checkpoint can be used: starting again at round 0")
            return state, []
        del state  # there may not be room for two
        self.say(f"going on from the checkpoint of round {rounds}")
        found = self.checkpoints.restore(rounds, saved(rounds))
        self.best = found.get("best", found["state"]) if config.keep == "best" else None
        return found["state"], done

    def blocks(self, done: int) -> Iterator[range]:
        """The rounds left, cut into calls, which end at an evaluation or a checkpoint at the latest."""
        t, total = done, self.config.rounds
        while t < total:
            ends = (t - t % n + n for n in (self.config.eval_every, self.config.checkpoint_every) if n)
            stop = min(*ends, t + self.prepared.blocks.rounds, total)
            yield range(t, stop)
            t = stop

    def read(self, rounds: range, metrics, state, began: float, history, progress) -> float:
        """Waits for a block, evaluates after it where that is due, and writes its lines."""
        metrics = jax.device_get(metrics)
        now, wire = time.perf_counter(), self.prepared.wire
        for i, t in enumerate(rounds):
            record: dict[str, Any] = {"round": t + 1}
            record |= {name: value[i].tolist() for name, value in metrics.items()}
            record = {name: value for name, value in record.items() if value or name not in SELDOM}
            if not np.isfinite(record["train_loss"]):
                del record["train_loss"]  # nobody sent anything, or anything finite
            if t + 1 == rounds.stop and self.due(t + 1):
                record |= self.measure(state, self.prepared.loaded.dataset.validation)
                if record[self.metric] > best_of(history, self.metric)[self.metric]:
                    self.best = tree.apart(state) if self.config.keep == "best" else None
            if not np.isfinite(record.get("loss", 0)):
                raise FloatingPointError(
                    f"loss is {record['loss']} in round {t + 1}: lower --lr, set --clip, or, where clients"
                    " are poisoned, give another --aggregator"
                )
            last = [*history, record][-min(HOPELESS, self.config.rounds) :]
            if all(lost(record) for record in last):
                raise FloatingPointError(
                    f"nothing that clients sent in rounds {last[0]['round']} to {t + 1} was finite: lower"
                    " --lr, or set --clip"
                )
            seconds = round((now - began) / len(rounds), 4)
            record |= {"bytes_up": wire.up, "bytes_down": wire.down, "seconds": seconds}
            self.write(record, history)
            loss = record.get("train_loss", float("nan"))
            text = f"loss {loss:.4f}  {self.metric} {self.latest(history):.3f}"
            progress.show(t + 1, f"{text}  {human(wire.up)} up a client")
        self.checkpoint(rounds.stop, state, history)
        return now

    def checkpoint(self, done: int, state: engine.RunState, history: list) -> None:
        """Saves the state after `done` rounds where that is due, and ends the run where it is told to."""
        every, told = self.config.checkpoint_every, hosts.anywhere(self.stop())
        due = every and (done % every == 0 or done == self.config.rounds)
        if self.checkpoints and (due or told):
            other = self.best is not None and best_of(history, self.metric)["round"] != done
            best = {"best": self.best} if other else {}
            self.checkpoints.save(done, {"state": state} | best)
        if told:
            if self.checkpoints:
                self.checkpoints.wait()
            raise Preempted(f"told to end, after round {done}")

    def due(self, done: int) -> bool:
        """Whether to evaluate after `done` rounds."""
        return done % self.config.eval_every == 0 or done == self.config.rounds

    def latest(self, history: list) -> float:
        """The newest validation metric."""
        return next(h[self.metric] for h in reversed(history) if self.metric in h)

    def kept(self, state: engine.RunState) -> engine.RunState:
        """Which state the run is judged by, given the last one."""
        return self.best if self.config.keep == "best" else state

    def measure(self, state: engine.RunState, split: Split) -> dict[str, float]:
        """The task's metrics on a split: of the global model, or of each client's own on its share."""
        if not self.personal:
            return self.evaluator.metrics(state.server, split)
        parts, classes = self.prepared.federation.parts, self.prepared.loaded.dataset.classes
        rng = np.random.default_rng([self.config.seed, OWNERS])
        whose = owners(np.asarray(split.labels), parts, classes, rng)
        return personal_metrics(self.evaluator, state.server, state.clients, split, whose)

    def write(self, record: dict[str, Any], history: list) -> None:
        """Keeps a record, and appends its line."""
        history.append(record)
        if self.out and hosts.first():
            append_line(self.out / METRICS, record)

    def test(self, state: engine.RunState, params: Params) -> dict[str, float]:
        """The test split's one use."""
        return test_metrics(
            lambda split: self.measure(state, split),
            lambda generation: generated(self.prepared.loaded.fns, params, generation),
            self.prepared.loaded.dataset,
        )
