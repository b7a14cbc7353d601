"""A run's rounds on record: their lines in its folder, its checkpoints, and the best state so far."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fedgalore_jax import hosts, tree
from fedgalore_jax.checkpoint import Checkpoints, abstract, rounds_in
from fedgalore_jax.config import Config
from fedgalore_jax.folder import (
    CONFIG,
    METRICS,
    SUMMARY,
    append_line,
    is_new,
    read_json,
    read_lines,
    refuse_used,
    write_json,
    write_lines,
)
from fedgalore_jax.types import Tree

DATA, WEIGHTS = "data_digest", "weights_digest"
DIGESTS = {DATA: "the data", WEIGHTS: "the weights that no round changes"}
"""In `config.json`, beside the config: what a run needs besides its checkpoint, see `Prepared.digests`."""


class Finished(NamedTuple):
    """What a complete run left in its folder.

    Attributes:
      history: one dict per round, the lines of `metrics.jsonl`.
      summary: the contents of `summary.json`.
    """

    history: list[dict[str, Any]]
    summary: dict[str, Any]


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


def changes(config: Config, digests: Mapping[str, str] | None = None) -> dict[str, tuple[Any, Any]]:
    """What differs from the run that goes on in `out_dir`, `{field: (old, new)}`.

    Args:
      config: of the run that goes on.
      digests: of what it needs besides its checkpoint, `{name: digest}`, where they are known.

    Raises:
      ValueError: something does, and `override` is not set; or rounds that are done would have to go.
    """
    out = pathlib.Path(config.out_dir or "")
    if not config.resume or is_new(out):
        return {}
    was = read_json(out / CONFIG)
    if not isinstance(was, dict):
        raise ValueError(f"{out / CONFIG} holds no config: choose another folder")
    before = {name: was.pop(name, None) for name in DIGESTS}
    differing = config.changes(was)
    now = {name: digest for name, digest in (digests or {}).items() if before[name]}
    others = {name: (before[name], digest) for name, digest in now.items() if digest != before[name]}
    if config.rounds < (done := max(rounds_in(out), default=0)):
        raise ValueError(
            f"rounds={config.rounds}: out_dir={config.out_dir!r} holds {done} rounds: give as many or more,"
            " or start in a new folder"
        )
    # The digest of the data covers who has what: "one of N clients" must be the same one in every round.
    changed = differing | others
    private = [name for name in ("dp_clip", "dp_noise", "clients", "cohort", DATA) if name in changed]
    if private and config.override and (config.dp_noise or "dp_noise" in differing):
        raise ValueError(
            f"out_dir={config.out_dir!r} cannot go on with other {', '.join(private)}: epsilon is that of"
            " a whole run; give the old values, or start in a new folder"
        )
    if changed and not config.override:
        said = [f"{name} was {old!r} and is {new!r}" for name, (old, new) in differing.items()]
        said += [f"{DIGESTS[name]} are not those it began with" for name in others]
        raise ValueError(
            f"out_dir={config.out_dir!r} cannot go on: {', '.join(said)}; give the old values, or --override"
            " to go on with the new ones"
        )
    return changed


def best_of(history: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    """The first record with the best validation metric."""
    return max((record for record in history if metric in record), key=lambda record: record[metric])


class Journal:
    """The record that one run keeps.

    Args:
      config: of the run.
      digests: of what it needs besides a checkpoint, see `Prepared.digests`.
      metric: which of a record's numbers says how good the state after its round is.
      out: the run's folder, where it has one.
      checkpoints: those in it.
      frozen: which leaves of a state are the model's own all along, see `engine.frozen`; a checkpoint is
        without them.
      say: takes a line for each thing that is not as it should be.

    Attributes:
      history: a record for round 0, and one for each round that was read.
      best: the state that validated best, with `keep=best`.
      complete: whether the folder held all of a complete run, to which nothing is to be added.
    """

    def __init__(
        self,
        config: Config,
        digests: Mapping[str, str],
        metric: str,
        out: pathlib.Path | None = None,
        checkpoints: Checkpoints | None = None,
        frozen: Tree = None,
        say: Callable[[str], None] = print,
    ):
        self.config, self.digests, self.metric = config, digests, metric
        self.out, self.checkpoints, self.frozen, self.say = out, checkpoints, frozen, say
        self.history: list[dict[str, Any]] = []
        self.best: Any = None
        self.complete = False

    @property
    def latest(self) -> float:
        """The newest validation metric."""
        return next(record[self.metric] for record in reversed(self.history) if self.metric in record)

    def open(self, new: Callable[[], Tree]) -> Tree:
        """The state to begin with; history and folder are made to tell of the rounds that led to it.

        Lines of `metrics.jsonl` after the checkpoint are dropped; their rounds are computed again, and are
        bit by bit what they were.

        Args:
          new: makes the state before round 0.
        """
        config, out, state = self.config, self.out, new()
        if out is None or self.checkpoints is None:
            return state
        history, changed = read_lines(out / METRICS), changes(config, self.digests)
        moving = tree.without(self.frozen, state)
        like = abstract(moving)

        def saved(rounds):
            best = best_of(history[: rounds + 1], self.metric)["round"]
            return {"state": like} | ({"best": like} if config.keep == "best" and best != rounds else {})

        self.complete = (out / SUMMARY).exists() and not changed
        begun = history or rounds_in(out)
        rounds = self.checkpoints.newest(saved, len(history) - 1, self.say)
        if self.complete and rounds < config.rounds:
            raise FileExistsError(
                f"out_dir={config.out_dir!r} is complete, but the checkpoint of its last round is gone:"
                " what it learned is in its model/ (or models/)"
            )
        self.history = history[: rounds + 1] if rounds else []
        hosts.meet("the folder was read")
        if hosts.first():
            if changed:
                (out / SUMMARY).unlink(missing_ok=True)
            write_json(out / CONFIG, {**dataclasses.asdict(config), **self.digests})
            write_lines(out / METRICS, self.history)
        if not rounds:
            if begun:
                self.say("no checkpoint can be used: starting again at round 0")
            return state
        state, moving = tree.without(moving, state), None  # there may not be room for two
        self.say(f"going on from the checkpoint of round {rounds}")
        found = self.checkpoints.restore(rounds, saved(rounds))
        if config.keep == "best":
            self.best = tree.apart(tree.joined(found.get("best", found["state"]), state))
        return tree.joined(found["state"], state)

    def write(self, record: dict[str, Any], state: Tree) -> None:
        """Keeps a record and appends its line, and keeps the state after its round where that is the best."""
        self.history.append(record)
        if self.config.keep == "best" and best_of(self.history, self.metric) is record:
            self.best = tree.apart(state)
        if self.out and hosts.first():
            append_line(self.out / METRICS, record)

    def save(self, done: int, state: Tree, *, told: bool) -> None:
        """Begins a checkpoint of the state after `done` rounds where one is due or the run is told to end."""
        every = self.config.checkpoint_every
        due = every and (done % every == 0 or done == self.config.rounds)
        if not self.checkpoints or not (due or told):
            return
        other = self.best is not None and best_of(self.history, self.metric)["round"] != done
        states = {"state": state} | ({"best": self.best} if other else {})
        self.checkpoints.save(done, {name: tree.without(self.frozen, x) for name, x in states.items()})
        if told:
            self.checkpoints.wait()

    def kept(self, state: Tree) -> Tree:
        """Which state the run is judged by, given the last one."""
        return self.best if self.config.keep == "best" else state
