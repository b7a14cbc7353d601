"""The one loop with side effects: trains, evaluates, writes."""

import contextlib
import io
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from fedgalore_jax import blocks, engine, hosts
from fedgalore_jax.checkpoint import Checkpoints
from fedgalore_jax.config import Config
from fedgalore_jax.data import Dataset, Split
from fedgalore_jax.data.federated import OWNERS
from fedgalore_jax.data.partition import owners
from fedgalore_jax.evaluation import generated, personal_metrics, test_metrics
from fedgalore_jax.folder import SUMMARY, claim, read_json, remove_leftovers, write_json
from fedgalore_jax.journal import Journal
from fedgalore_jax.loading import Model
from fedgalore_jax.plans import plan
from fedgalore_jax.prepare import Prepared, describe, prepare
from fedgalore_jax.progress import Progress, human
from fedgalore_jax.results import save_models, summary
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
    """Trains, saves, judges on the test split, and writes; see `run`.

    The models are saved first: a test that fails costs none.

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
        digests, metric = prepared.digests, prepared.task.metric
        journal = Journal(config, digests, metric, out, checkpoints, prepared.frozen, say)
        loop = _Loop(prepared, journal, stop)
        state, history = loop.run(), journal.history
        params = prepared.machine.strategy.export(state.server)
        if hosts.several():
            params = hosts.fetch(params)
        if out and journal.complete:
            return Result(params, history, read_json(out / SUMMARY))
        if out:
            save_models(out, prepared, state, params, say)
        result = Result(params, history, summary(prepared, history, loop.test(state, params)))
        if out and hosts.first():
            draw(result)
            write_json(out / SUMMARY, result.summary)
    return result


def validate(prepared: Prepared) -> dict[str, Any]:
    """Trains and returns the last round's record; neither writes nor looks at the test split."""
    journal = Journal(prepared.config, prepared.digests, prepared.task.metric)
    _Loop(prepared, journal).run()
    return journal.history[-1]


class _Loop:
    """The rounds of one run, and what is measured on the way."""

    def __init__(self, prepared: Prepared, journal: Journal, stop: Callable[[], bool] = never):
        self.prepared, self.config = prepared, prepared.config
        self.journal, self.stop = journal, stop
        self.personal, self.evaluator = prepared.machine.strategy.personal, prepared.evaluator
        self.metric = prepared.task.metric

    def run(self) -> engine.RunState:
        """All rounds that are left, into the journal; the state to keep.

        Block t - 1 is read, evaluated and written while block t computes.
        """
        config, machine, journal = self.config, self.prepared.machine, self.journal
        params, pieces = self.prepared.loaded.params, self.prepared.blocks
        state = journal.open(lambda: blocks.start(config, machine, params, pieces))
        done = journal.history[-1]["round"] if journal.history else 0
        progress = Progress(config.rounds, done, None if hosts.first() else io.StringIO())
        try:
            if not journal.history:
                begin = self.measure(state, self.prepared.loaded.dataset.validation)
                if not np.isfinite(begin.get("loss", 0)):
                    raise FloatingPointError(
                        f"loss is {begin['loss']} before training: look at the model's weights and the data"
                    )
                journal.write({"round": 0} | begin, state)
            if done == config.rounds:
                return journal.kept(state)
            progress.show(done, f"{self.metric} {journal.latest:.3f}  compiling")
            program = self.prepared.compile()
            began, pending = time.perf_counter(), None
            for rounds in self.blocks(done):
                rows = plan(config, machine.chunk, self.prepared.federation, rounds, pieces.rounds)
                if pending is not None and pieces.slots:  # its state is written over
                    began, pending = self.read(*pending, began, progress), None
                state, metrics = blocks.advance(program, machine, state, rows, len(rounds), pieces)
                if pending is not None:
                    began = self.read(*pending, began, progress)
                absent = [config.participants - np.count_nonzero(counts) for counts in rows.counts]
                pending = (rounds, metrics | {"absent": np.array(absent)}, state)
            if pending is not None:
                self.read(*pending, began, progress)
        finally:
            progress.close()
        return journal.kept(state)

    def blocks(self, done: int) -> Iterator[range]:
        """The rounds left, cut into calls, which end at an evaluation or a checkpoint at the latest."""
        t, total = done, self.config.rounds
        while t < total:
            ends = (t - t % n + n for n in (self.config.eval_every, self.config.checkpoint_every) if n)
            stop = min(*ends, t + self.prepared.blocks.rounds, total)
            yield range(t, stop)
            t = stop

    def read(self, rounds: range, metrics, state, began: float, progress: Progress) -> float:
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
            if not np.isfinite(record.get("loss", 0)):
                raise FloatingPointError(
                    f"loss is {record['loss']} in round {t + 1}: lower --lr, set --clip, or, where clients"
                    " are poisoned, give another --aggregator"
                )
            last = [*self.journal.history, record][-min(HOPELESS, self.config.rounds) :]
            if all(lost(record) for record in last):
                raise FloatingPointError(
                    f"nothing that clients sent in rounds {last[0]['round']} to {t + 1} was finite: lower"
                    " --lr, or set --clip"
                )
            seconds = round((now - began) / len(rounds), 4)
            record |= {"bytes_up": wire.up, "bytes_down": wire.down, "seconds": seconds}
            self.journal.write(record, state)
            loss = record.get("train_loss", float("nan"))
            text = f"loss {loss:.4f}  {self.metric} {self.journal.latest:.3f}"
            progress.show(t + 1, f"{text}  {human(wire.up)} up a client")
        told = hosts.anywhere(self.stop())
        self.journal.save(rounds.stop, state, told=told)
        if told:
            raise Preempted(f"told to end, after round {rounds.stop}")
        return now

    def due(self, done: int) -> bool:
        """Whether to evaluate after `done` rounds."""
        return done % self.config.eval_every == 0 or done == self.config.rounds

    def measure(self, state: engine.RunState, split: Split) -> dict[str, float]:
        """The task's metrics on a split: of the global model, or of each client's own on its share."""
        if not self.personal:
            return self.evaluator.metrics(state.server, split)
        parts, classes = self.prepared.federation.parts, self.prepared.loaded.dataset.classes
        rng = np.random.default_rng([self.config.seed, OWNERS])
        whose = owners(np.asarray(split.labels), parts, classes, rng)
        return personal_metrics(self.evaluator, state.server, state.clients, split, whose)

    def test(self, state: engine.RunState, params: Params) -> dict[str, float]:
        """The test split's one use."""
        return test_metrics(
            lambda split: self.measure(state, split),
            lambda generation: generated(self.prepared.loaded.fns, params, generation),
            self.prepared.loaded.dataset,
        )
