"""The description of a run. Plain data: `dataclasses.asdict(config)` as JSON is a run's `config.json`."""

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

SCHEDULES = ("constant", "linear", "cosine")
PRECISIONS = ("float32", "bf16")
"""What products run in. Softmax, statistics of norms and logits are in float32 or wider in both."""
KEEP = ("last", "best")
AGGREGATORS = ("mean", "median", "trimmed_mean", "norm_clip")
MAY_CHANGE = ("out_dir", "checkpoint_every", "keep_checkpoints", "resume", "override", "mesh")
"""Fields that may differ when a run goes on: no number of it depends on them, rounding aside."""


def mistyped(value: object, hint: Any) -> str | None:
    """What to give in place of a value that is not of an annotated type, None where it is.

    Types matter where values come from a command line or a script: `"0.1"`, or 1 for True, goes wrong late.

    >>> mistyped("0.1", float | None), mistyped(1, float), mistyped(1, bool)
    ('float or None', None, 'bool')
    >>> mistyped(("8",), tuple[int, ...] | None)
    'a tuple of int or None'
    """
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    accepted: Any = tuple(get_origin(kind) or kind for kind in kinds)
    of = [get_args(kind)[0] for kind in kinds if get_args(kind)[1:] == (...,)]
    fits = isinstance(value, accepted) or (float in accepted and isinstance(value, int))
    if isinstance(value, tuple) and of:
        fits = not any(mistyped(item, of[0]) for item in value)
    if fits and (bool in accepted or not isinstance(value, bool)):
        return None

    def name(kind: Any) -> str:
        if kind is type(None):
            return "None"
        return f"a tuple of {name(get_args(kind)[0])}" if get_args(kind)[1:] == (...,) else kind.__name__

    return " or ".join(map(name, kinds))


@dataclass(frozen=True)
class Config:
    """A run; every field is a flag of `run.py` of the same name.

    Attributes:
      task: what is learned, see `tasks.names()`.
      data: a file or folder: your own data (tasks text, images, sft), or a local copy of a task's.
      text_column: of your data; two, comma-separated, are a pair of sentences.
      label_column: of your data, for task text.
      client_column: of your data; its values are the domains of the partition.
      max_length: tokens kept of a text; the task's default if None. The model's positions bound it anyway.
      model: a model directory in Hugging Face's layout, or a model the package ships; the task's if None.
      new_head: start with a new, random head even where the model's own would fit.
      precision: of activations, "float32" or "bf16"; parameters and reductions are float32 in both.
      scan_layers: compile one layer and scan over the stack; by depth if None.
      remat: recompute a layer's activations in the backward pass: less memory, a third more work.
      method: a strategy, see `strategies.names()`.
      opt: the strategy's own options, `{"sync": "mean"}`.
      client_weights: "factored" or "dense", for the strategies that have both.
      rounds: communication rounds.
      clients: N, clients in all.
      cohort: C, clients of a round; all of them if None.
      local_steps: K, optimizer steps of a client in a round.
      batch_size: B.
      lr: the clients' learning rate; the one tuned for this task and method if None.
      head_lr: learning rate of plainly trained leaves (the head); `lr` if None.
      schedule: of the learning rate over all rounds * local_steps steps: "constant", or "linear" or
        "cosine" decay to 0.
      rank: r of adapters and gradient subspaces.
      ranks: of the clients' adapters, cycled over their ids, for the strategies that let them differ;
        the largest is `rank`. A flag takes them as 8,4,2 or from a file.
      weight_decay: decoupled, on kernels.
      clip: norm above which a client's gradient is scaled down; 0 switches it off.
      dropout: probability, in place of the model's own; the model's if None.
      adapt: path regexes of the kernels that a method adapts, comma-separated.
      train: path regexes of the leaves that every method trains plainly, comma-separated (others are
        frozen); the task's, its model's head, if None.
      partition: how samples are dealt to clients, see `data.PARTITIONS`. By default "domain" with a
        `client_column`, "dirichlet" where there are classes to skew, else "iid".
      alpha: concentration of the Dirichlet partitions; small is skewed.
      shards: classes a client has in the "shards" partition.
      sigma: of the log-normal client sizes in the "quantity" partition.
      client_dropout: chance that a client of a round sends nothing.
      straggler: law of the time of a client's local step in a round: exponential:MEAN,
        lognormal:MEDIAN:SIGMA or uniform:LOW:HIGH; needs a `deadline`.
      deadline: of a round, in the time unit of `straggler`: a client sends what it has by then.
      aggregator: how uploads become one: "mean", or against poisoned ones "median", "trimmed_mean" or
        "norm_clip".
      trim: of "trimmed_mean", the share of clients dropped at each end; 0.3 if None.
      dp_clip: norm that a client's change is scaled down to (client-level DP-FedAvg); with `dp_noise`.
      dp_noise: standard deviation of the noise on the sum of changes, in multiples of `dp_clip`.
      chunk: clients trained at a time; None is the whole cohort, and on a CPU as many as its caches serve.
      mesh: devices over which a run is spread, clients x model: with "8x1" each of eight trains an eighth of
        the cohort, with "4x2" two share the weights of each quarter; one device if None.
      eval_every: rounds between evaluations on the validation split.
      eval_samples: at most so many of each validation and test split, drawn at random; all if None.
      keep: which model is saved and judged on the test split, the "last" or the "best" on validation.
      seed: of every random choice.
      out_dir: where the run is written; nothing is written if None.
      checkpoint_every: rounds between checkpoints in `out_dir`, which `resume` goes on from; there is one
        after the last round too. With 0 there is none, but where the run is told to end (SIGTERM).
      keep_checkpoints: the newest that are kept; with two, a damaged one has one before it.
      resume: go on with the run in `out_dir`; a new one starts there if there is none.
      override: resume although fields, or the data, differ from those that the run in `out_dir` began with.
    """

    task: str = "digits"
    data: str | None = None
    text_column: str = "text"
    label_column: str = "label"
    client_column: str | None = None
    max_length: int | None = None
    model: str | None = None
    new_head: bool = True
    precision: str = "float32"
    scan_layers: bool | None = None
    remat: bool = False
    method: str = "fedgalore"
    opt: dict[str, Any] = field(default_factory=dict)
    client_weights: str | None = None
    rounds: int = 30
    clients: int = 10
    cohort: int | None = None
    local_steps: int = 20
    batch_size: int = 16
    lr: float | None = None
    head_lr: float | None = None
    schedule: str = "constant"
    rank: int = 4
    ranks: tuple[int, ...] | None = None
    weight_decay: float = 0.0
    clip: float = 1.0
    dropout: float | None = None
    adapt: str = "layers/.*kernel"
    train: str | None = None
    partition: str | None = None
    alpha: float = 0.1
    shards: int = 2
    sigma: float = 1.0
    client_dropout: float = 0.0
    straggler: str | None = None
    deadline: float | None = None
    aggregator: str = "mean"
    trim: float | None = None
    dp_clip: float | None = None
    dp_noise: float | None = None
    chunk: int | None = None
    mesh: str | None = None
    eval_every: int = 1
    eval_samples: int | None = None
    keep: str = "last"
    seed: int = 0
    out_dir: str | None = None
    checkpoint_every: int = 10
    keep_checkpoints: int = 2
    resume: bool = False
    override: bool = False

    def __post_init__(self):
        """Refuses what cannot run, before anything is loaded or compiled."""
        for name in ("data", "model", "out_dir"):
            if isinstance(path := getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(path))
        for name, hint in get_type_hints(type(self)).items():
            wanted = mistyped(getattr(self, name), hint)
            self._require(name, wanted is None, wanted)
        for name, value in vars(self).items():
            self._require(name, value != "" or name in ("adapt", "train"), "a value, or leave it out")
        counts = ("rounds", "clients", "local_steps", "batch_size", "rank", "eval_every", "shards")
        for name in (*counts, "keep_checkpoints"):
            self._require(name, getattr(self, name) >= 1, "an integer >= 1")
        for name in ("cohort", "chunk", "max_length", "eval_samples"):
            value = getattr(self, name)
            self._require(name, value is None or value >= 1, "an integer >= 1, or leave it out")
        for name in ("lr", "head_lr", "deadline", "dp_clip", "dp_noise"):
            value = getattr(self, name)
            self._require(name, value is None or 0 < value < math.inf, "a positive, finite number")
        fits = self.ranks is None or (min(self.ranks, default=0) >= 1 and max(self.ranks) == self.rank)
        self._require("ranks", fits, f"integers >= 1, the largest of them --rank, {self.rank}")
        for name in ("weight_decay", "clip"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "a finite number >= 0")
        for name in ("alpha", "sigma"):
            self._require(name, 0 < getattr(self, name) < math.inf, "a positive, finite number")
        self._require("dropout", self.dropout is None or 0 <= self.dropout < 1, "a number in [0, 1)")
        named = {"schedule": SCHEDULES, "precision": PRECISIONS, "keep": KEEP, "aggregator": AGGREGATORS}
        for name, accepted in named.items():
            self._require(name, getattr(self, name) in accepted, f"one of {', '.join(accepted)}")
        self._check_faults()
        self._require("seed", 0 <= self.seed < 2**32, "an integer from 0 to 2**32 - 1")
        self._require("checkpoint_every", self.checkpoint_every >= 0, "an integer >= 0; 0 for none")
        self._require("resume", not self.resume or self.out_dir, "--out_dir too, the folder of the run")
        self._require("override", not self.override or self.resume, "--resume too")
        fits = self.cohort is None or self.cohort <= self.clients
        self._require("cohort", fits, f"at most --clients, {self.clients}")
        fits = self.mesh is None or re.fullmatch(r"[1-9]\d*x[1-9]\d*", self.mesh)
        self._require("mesh", fits, "two numbers, clients x model, such as 8x1")

        for name in ("adapt", "train"):
            try:
                for pattern in (getattr(self, name) or "").split(","):
                    re.compile(pattern)
            except re.error as error:
                self._require(name, False, f"regular expressions ({error})")

    def _check_faults(self):
        """Refuses what does not go together of dropouts, stragglers, poisoned clients and privacy."""
        robust = self.aggregator != "mean"
        self._require("client_dropout", 0 <= self.client_dropout < 1, "a number in [0, 1)")
        for one, other in (("straggler", "deadline"), ("dp_clip", "dp_noise")):
            pair = getattr(self, one), getattr(self, other)
            self._require(one, pair[0] is None or pair[1] is not None, f"--{other} too")
            self._require(other, pair[1] is None or pair[0] is not None, f"--{one} too")
        self._require("trim", self.trim is None or 0 < self.trim < 0.5, "a number between 0 and 1/2")
        fits = self.trim is None or self.aggregator == "trimmed_mean"
        self._require("trim", fits, "--aggregator=trimmed_mean too")
        self._require("aggregator", not robust or self.dp_clip is None, "mean, with --dp_clip")
        self._require("aggregator", not robust or self.participants > 2, "mean, or a cohort of 3 at least")

    def changes(self, was: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """What differs from an earlier run, `{field: (old, new)}`, but for what may (`MAY_CHANGE`).

        Args:
          was: the earlier run's `config.json`; a field that it lacks had its default.
        """
        now = json.loads(json.dumps(dataclasses.asdict(self)))
        was = json.loads(json.dumps(dataclasses.asdict(Config()))) | dict(was)
        names = [name for name in (*now, *was.keys() - now) if name not in MAY_CHANGE]
        pairs = {name: (was[name], now.get(name)) for name in names}
        return {name: (old, new) for name, (old, new) in pairs.items() if old != new}

    def _require(self, name: str, ok: Any, remedy: str | None) -> None:
        if not ok:
            raise ValueError(f"{name}={getattr(self, name)!r} is not usable: give {remedy}")

    @property
    def participants(self) -> int:
        """C: `cohort`, or all clients."""
        return self.cohort or self.clients

    def roles(self, train: str) -> tuple[tuple[str, str], ...]:
        """`adapt` and `train` as the ordered rules that strategies take; `train` is the task's default."""
        train = train if self.train is None else self.train
        patterns = [(p, "train") for p in train.split(",") if p]
        patterns += [(p, "adapt") for p in self.adapt.split(",") if p]
        return (*patterns, (".*", "freeze"))
