"""From a `Config` to a run known to be sound: loaded, split and traced, nothing compiled or written."""

import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from fedgalore_jax import (
    blocks,
    defences,
    engine,
    evaluation,
    hosts,
    placement,
    strategies,
    tasks,
    tree,
)
from fedgalore_jax.config import Config
from fedgalore_jax.data import Dataset, FederatedData, partition
from fedgalore_jax.data.federated import PARTITION
from fedgalore_jax.data.partition import table
from fedgalore_jax.folder import refuse_used
from fedgalore_jax.journal import DATA, WEIGHTS, changes
from fedgalore_jax.loading import Loaded, Model, load
from fedgalore_jax.plans import plan
from fedgalore_jax.strategies.base import ROLES, Common
from fedgalore_jax.types import Array, Flat, Params

BY_FLAG = {"roles": "--adapt and --train", "head_ratio": "--head_lr"}
"""Options of every method that have flags of their own, under other names."""


class Prepared(NamedTuple):
    """A run that may begin.

    Attributes:
      config: of the run.
      task, loaded, federation: what is learned, from what, by whom.
      digests: of what a run needs besides its checkpoint: the data and who has what, the weights that no
        round changes; as its `config.json` has them.
      machine: the engine.
      blocks: how its rounds are cut into calls.
      compile: makes the program of its rounds, see `engine.Engine.rounds`.
      evaluator: of what `Strategy.export` takes.
      wire: bytes of one client.
      traced: the program of its rounds.
      frozen: which leaves of a state are the model's own all along, see `engine.frozen`.
    """

    config: Config
    task: tasks.Task
    loaded: Loaded
    federation: FederatedData
    digests: dict[str, str]
    machine: engine.Engine
    blocks: blocks.Blocks
    compile: Callable[[], Any]
    evaluator: evaluation.Evaluator
    wire: engine.Wire
    traced: jax.stages.Traced
    frozen: engine.RunState


def prepare(
    config: Config,
    *,
    model: Model | None = None,
    dataset: Dataset | None = None,
    beside: Prepared | None = None,
    any_trial: bool = False,
) -> Prepared:
    """Everything that can fail for a bad configuration.

    Args:
      config: of the run.
      model: `(fns, params)` in place of the one that `config.model` names.
      dataset: in place of the one that `config.task` loads; the task still gives loss and metrics.
      beside: a run that differs in its method alone, whose data and model this one takes.
      any_trial: whether the program serves all seeds, and takes the learning rate as an argument, its first,
        in place of the config's.

    Raises:
      ValueError: a value that cannot be used, with its name and the remedy.
      OSError: `out_dir` already holds something, or cannot be written (the first of several processes sees).
    """
    if config.out_dir and hosts.first():
        refuse_used(pathlib.Path(config.out_dir), resume=config.resume)
        changes(config)
    task = tasks.get(config.task)
    strategy = strategy_of(config, task)
    mesh = placement.mesh(config.mesh)
    loaded = beside.loaded if beside else load(config, task, mesh, model=model, dataset=dataset)
    dataset, fns, params, _ = loaded
    federation = federate(config, dataset)
    digests = {DATA: beside.digests[DATA] if beside else dataset.digest(federation.parts)}
    if config.out_dir and hosts.first():
        changes(config, digests)
    deals_classes = dataset.label_names and not task.answers and "domain" not in partition_of(config, dataset)
    if strategy.personal and not deals_classes:
        raise ValueError(
            f"{config.method} has a model per client, each judged on its share of the classes:"
            " it needs a task with classes, and a partition that deals by them"
        )
    streams = blocks.streams(dataset.train)
    train = beside.machine.train if beside else engine.on_device(dataset.train, mesh, streams=streams)

    def loss(params, batch, key):
        return task.loss(fns.apply(params, batch, key=key), batch)

    machine = engine.Engine(
        strategy,
        loss,
        train,
        config.clients,
        config.local_steps,
        blocks.chunk(
            config,
            placement.shares(mesh),
            lambda: blocks.activations(loss, params, train, config.batch_size),
        ),
        mesh,
        streams,
        defences.aggregator(config, strategy),
    )
    state = jax.eval_shape(lambda: blocks.start(config, machine, params))
    most = len(dataset.train.labels) if any_trial else max(map(len, federation.parts))
    pieces = blocks.cut(config, machine, most, state.clients)
    state = state._replace(clients=pieces.on_devices(state.clients))
    if mesh:
        state = placement.placed(state, engine.shardings(strategy, state, mesh))
    rows = plan(config, machine.chunk, federation, range(pieces.rounds), pieces.rounds)

    def with_rate(rate, *args):
        return machine._replace(strategy=strategy_of(config, task, rate)).program()(*args)

    args = (state, *blocks.load(machine, rows, pieces), 1)
    traced = jax.jit(with_rate).trace(1.0, *args) if any_trial else machine.program().trace(*args)
    wire = machine.wire(state, rows)
    export = (lambda state: strategy.export(*state)) if strategy.personal else strategy.export
    evaluator = evaluation.evaluator(task, fns, export, mesh)
    frozen = engine.frozen(strategy, params, config.clients, traced.out_info[0])
    if config.out_dir:
        digests[WEIGHTS] = tree.digest(frozen)
        if hosts.first():
            changes(config, digests)
    return Prepared(
        config,
        task,
        loaded,
        federation,
        digests,
        machine,
        pieces,
        functools.partial(engine.compiled, traced.lower()),
        evaluator,
        wire,
        traced,
        frozen,
    )


def strategy_of(config: Config, task: tasks.Task, rate: Array | None = None) -> strategies.Strategy:
    """The strategy that a config names, with its options; a (traced) `rate` takes the place of its lr."""
    method, given = config.method, dict(config.opt)
    own = strategies.options(method)
    for name, flags in BY_FLAG.items():
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
    lr = task.lr.get(given.get("base", method)) if lr is None else lr
    if lr is None:
        raise ValueError(f"no learning rate is tuned for {method} on {config.task}: give --lr")
    if not isinstance(lr, int | float) or not 0 < lr < math.inf:
        raise ValueError(f"lr={lr!r} is not usable: give a positive, finite number")
    if rate is not None:
        lr = rate
    steps = config.rounds * config.local_steps
    shape = {
        "constant": None if rate is None else optax.constant_schedule(1.0),
        "linear": optax.linear_schedule(1.0, 0.0, steps),
        "cosine": optax.cosine_decay_schedule(1.0, steps),
    }[config.schedule]
    common = {
        "lr": lr if shape is None else lambda step: lr * shape(step),
        "rank": config.rank,
        "ranks": config.ranks,
        "head_ratio": config.head_lr / lr if config.head_lr else 1.0,
        "weight_decay": config.weight_decay,
        "clip": config.clip,
        "roles": config.roles(task.train),
    }
    return strategies.build(method, **(common | given))


def federate(config: Config, dataset: Dataset) -> FederatedData:
    """Splits the training set over the clients."""
    parts = partition(
        dataset.classes,
        config.clients,
        kind=partition_of(config, dataset),
        alpha=config.alpha,
        rng=np.random.default_rng([config.seed, PARTITION]),
        domains=dataset.domains,
        shards=config.shards,
        sigma=config.sigma,
    )
    return FederatedData(parts, config.seed)


def partition_of(config: Config, dataset: Dataset) -> str:
    """How samples are dealt: as the config says, or as the data suggest."""
    skewable = len(np.unique(dataset.classes)) > 1
    kind = config.partition
    if kind is None:
        return "domain" if config.client_column else "dirichlet" if skewable else "iid"
    if config.client_column and "domain" not in kind:
        raise ValueError(f"client_column={config.client_column!r} has no effect: give --partition=domain")
    if not skewable and ("dirichlet" in kind or kind == "shards"):
        raise ValueError(f"partition={kind!r} skews classes, and {config.task} has one: give another")
    return kind


def describe(prepared: Prepared) -> str:
    """The run in a few lines: who learns what from which data, and what is trained."""
    config, task, parts = prepared.config, prepared.task, prepared.federation.parts
    dataset = prepared.loaded.dataset
    lines = [
        f"{config.task}, {config.method}: {config.participants} of {config.clients} clients a round,"
        f" {config.rounds} rounds of {config.local_steps} local steps, seed {config.seed}",
        *dataset.notes,
        table(parts, dataset.classes, dataset.domains, dataset.domain_names),
        roles_table(config, task, prepared.loaded.params),
    ]
    if promised := defences.guarantee(config):
        lines.append(f"  privacy epsilon {promised.epsilon:.3g} at delta {promised.delta:.2g}")
    return "\n".join(lines)


def by_role(config: Config, task: tasks.Task, params: Params) -> tuple[Flat, Flat, Flat]:
    """A model's leaves: adapted, trained, frozen."""
    return Common(1.0, roles=config.roles(task.train)).split(tree.flatten(params))


def roles_table(config: Config, task: tasks.Task, params: Params) -> str:
    """What is adapted, trained and frozen, one line each."""
    lines = []
    for role, leaves in zip(ROLES, by_role(config, task, params), strict=True):
        count = sum(leaf.size for leaf in leaves.values())
        lines.append(f"  {role:<7}{count:>12,} parameters: {tree.braced(leaves) or '-'}")
    return "\n".join(lines)
