"""The models that a run leaves in its folder."""

import pathlib
from collections.abc import Callable, Iterable

import jax

from fedgalore_jax import engine, hosts, models, tree
from fedgalore_jax.data import tokens
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
