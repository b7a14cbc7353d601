"""What a run leaves in its folder at its end: its models, and the numbers of `summary.json`."""

import pathlib
import platform
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import Any

import jax
import numpy as np

from fedgalore_jax import defences, engine, hosts, models, placement, tree
from fedgalore_jax.data import tokens
from fedgalore_jax.journal import best_of
from fedgalore_jax.prepare import Prepared, by_role
from fedgalore_jax.types import Params


def save_models(
    out: pathlib.Path, prepared: Prepared, state: engine.RunState, params: Params, say: Callable[[str], None]
) -> None:
    """Writes `model/`, with `adapter/` where the method leaves one; a personalised method's `models/`.

    Where there are several processes, all give what they hold to the first, which writes.
    """
    strategy, config = prepared.machine.strategy, prepared.config

    def own(client):
        memory = jax.tree.map(lambda x: x[client], state.clients)
        return hosts.fetch(strategy.export(state.server, memory))

    found: Iterable[tuple[pathlib.Path, Params]] = [(out / "model", params)]
    if strategy.personal:
        found = ((out / "models" / f"client-{c}", own(c)) for c in range(config.clients))
    for folder, model in found:
        if hosts.first():
            models.save(folder, prepared.loaded.fns, model)
            if prepared.loaded.base:
                tokens.copy(prepared.loaded.base, folder)
    save_adapter(out / "adapter", prepared, state.server, params, say)


def save_adapter(path: pathlib.Path, prepared: Prepared, server, params, say: Callable[[str], None]) -> None:
    """Writes what was learned next to the model it began with, where a method leaves that as LoRA factors.

    What the folder cannot hold is named in one line through `say`.
    """
    strategy, base = prepared.machine.strategy, prepared.loaded.base
    if strategy.adapter is None or base is None:
        return
    factors, lora_alpha = strategy.adapter(server)
    factors = hosts.fetch(factors)
    kernels, head = models.adapter_paths(prepared.loaded.fns)
    _, trained, _ = by_role(prepared.config, prepared.task, params)
    if missing := (factors.keys() - kernels) | (trained.keys() - head):
        say(f"adapter/ is without {', '.join(sorted(missing))}: the whole result is in model/")
    kept, flat = {path: factors[path] for path in factors if path in kernels}, tree.flatten(params)
    if kept and hosts.first():
        models.save_adapter(
            path,
            prepared.loaded.fns,
            kept,
            base_model=str(base),
            lora_alpha=lora_alpha,
            rank=next(iter(kept.values())).a.shape[-1],
            head={path: flat[path] for path in head},
        )


def summary(prepared: Prepared, history: list[dict[str, Any]], final: dict[str, float]) -> dict[str, Any]:
    """What a run came to.

    Args:
      prepared: the run.
      history: a record of every round, see `train.Result`.
      final: metrics of the test split.
    """
    config, wire, metric = prepared.config, prepared.wire, prepared.task.metric
    judged, best = [record for record in history if metric in record], best_of(history, metric)
    kept = best if config.keep == "best" else judged[-1]
    missed = int(sum(record.get("bytes_catch_up", 0) for record in history))
    sent, absent = config.rounds * config.participants, sum(record.get("absent", 0) for record in history)
    promised = defences.guarantee(config)
    return {
        "method": config.method,
        "metric": metric,
        "final": final,
        "validation": {"final": kept[metric], "initial": judged[0][metric]},
        "best": {"round": best["round"], metric: best[metric]},
        "kept": {"which": config.keep, "round": kept["round"]},
        "personal": prepared.machine.strategy.personal,
        "rounds": config.rounds,
        "bytes_per_client_and_round": {"up": wire.up, "down": wire.down},
        **({"privacy": promised._asdict()} if promised else {}),
        "bytes_total": sent * (wire.up + wire.down) - absent * wire.up + missed,
        "bytes_catch_up": missed,
        "optimizer_bytes": wire.optimizer,
        "client_memory_bytes": wire.memory,
        "catch_up_bytes_per_missed_round": wire.catch_up,
        "gradients_per_step": wire.gradients,
        "seconds_per_round": float(np.median([record["seconds"] for record in history[1:]])),
        "device": f"{jax.devices()[0].device_kind} x {placement.size(prepared.machine.mesh)}",
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("jax", "flax", "optax", "numpy")},
    }
