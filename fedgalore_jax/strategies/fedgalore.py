"""FedGaLore: gradient-subspace AdamW on clients, full-space averaging, synchronised projected moments.

arXiv 2602.01746. What the paper fixes is known to us from its abstract [V]: GaLore-style clients, and a
server that aligns *projected second moments* by spectral shared-signal extraction (AJIVE [V2]). Every
other choice below is our reading, a named option, explained in
docs/design.md [I].

Ledger (m x n kernel projected on the left, floats per client and round; nu is the second moment)
  trained         Z [r, n] of every adapt kernel, W = c W0 + P Z; train leaves in full
  frozen          P [m, r] during the round; freeze leaves
  down            rn (mean Z) + rn per synchronised moment + a seed; basis=server: + mr when it is new;
                  basis=own or client_weights=dense: mn + rn per synchronised moment
  up              rn (Z) + rn per synchronised moment; basis=own: + mr;
                  client_weights=dense: mn + rn per synchronised moment
  kept by client  nothing (the base model; for each round missed, rn; basis=server: mr for each new basis)
  re-initialised  sync=none: both moments, every round; sync_first=false or basis=own: the first moment
Median and AJIVE need every client's nu (lane `stack`): not for secure aggregation.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedgalore_jax import placement, tree
from fedgalore_jax.adapters import merge
from fedgalore_jax.optimizer import WarmAdamState, adam_state, with_state
from fedgalore_jax.shared_signal import synchronise
from fedgalore_jax.strategies.base import Common, Download, Local, Strategy, Upload, change
from fedgalore_jax.strategies.fedgalore_options import Options, resolve
from fedgalore_jax.strategies.subspaces import Subspaces, in_given_bases, transported
from fedgalore_jax.types import Adapted, Array, Flat


class Extra(NamedTuple):
    """What the server sends besides weights.

    Attributes:
      adam: the synchronised moments, `()` with sync=none.
      basis: `{path: P}`, `()` with basis=own. With basis=shared it follows from `seed` and does not travel.
      step: the mean change that led to this round's weights, `()` where it would be dense.
      seed: key of all bases that the server makes.
    """

    adam: Any
    basis: Any
    step: Any
    seed: Array


class FedGaLoreState(NamedTuple):
    """The server's memory.

    Attributes:
      params: `{path: leaf}`, the whole model.
      extra: what goes along with it.
      round: int32 scalar.
    """

    params: Flat
    extra: Extra
    round: Array


def fedgalore(
    common: Common,
    *,
    client_weights: str = "factored",
    basis: str = "shared",
    refresh_rounds: int | None = None,
    finder: str | None = None,
    basis_batches: int | None = None,
    side: str = "left",
    sync: str = "ajive",
    sync_first: bool | None = None,
    transport: str | None = None,
    signal_rank: int | None = None,
    joint_rank: int | None = None,
    floor: float | None = None,
) -> Strategy:
    """Builds FedGaLore.

    Args:
      common: options shared by all strategies; `common.rank` is r.
      client_weights: "factored" trains Z next to the frozen kernel; "dense" trains full weights through
        `galore.in_subspace`. The numbers are the same (docs/design.md, F2); factored clients hold no m x n.
      basis: "shared" (from a seed; costs no upload), "server" (half from the last mean change of the
        weights, half random so that it can leave its span), "own" (each client's first gradients,
        which the first step takes as well).
      refresh_rounds: rounds a basis is kept; 5 by default. Own bases are new every round (1).
      finder: how an own basis is found, one of `lowrank.FINDERS`; "subspace" by default.
      basis_batches: batches whose mean gradient gives an own basis; 1 by default.
      side: "left" projects the input side of a kernel, "right" the output side.
      sync: what is done with the clients' second moments: "none" (all moments restart every round),
        "mean", "median", "ajive".
      sync_first: average the first moment too (ours, not the paper's); the default, but for own bases,
        which have no common coordinates in which signs could be averaged.
      transport: what becomes of the second moment's rows when the basis changes: "keep" (as galore_torch
        does [V]), "row_mean" (every row its mean over rows: all that unrelated bases share),
        "squared_overlap" (rows mixed by squared cosines between bases, normalised per row so that no mass
        is lost). Default "keep"; "row_mean" with own bases. The first moment is rotated by the overlap.
      signal_rank: AJIVE's rank per client; `max(1, r // 2)` by default.
      joint_rank: AJIVE's joint rank; by its thresholds when None.
      floor: AJIVE's smallest second moment, as a share of the column mean; 1e-3 by default.

    Returns:
      A `Strategy`.

    Raises:
      ValueError: an unknown name, or options that contradict each other.
    """
    given: tuple[Any, ...] = (client_weights, basis, refresh_rounds, finder, basis_batches, side)
    given += (sync, sync_first, transport, signal_rank, joint_rank, floor)
    o = resolve(Options(*given), common.rank)
    space = Subspaces(common.rank, side)
    own, dense = basis == "own", client_weights == "dense"

    tx = common.adamw()
    if dense:
        tx = optax.chain(in_given_bases(common.clipped_adam(), common, space), common.tail())

    def starting(adapt: Flat, train: Flat) -> Flat:
        """Where local training starts: Z = 0 next to a kernel, or the kernel itself."""
        if dense:
            return adapt | train
        shrink = {"shrink": jnp.ones(())} if common.weight_decay else {}
        return space.zeros(adapt) | train | shrink

    def init(params, key, num_clients):
        del num_clients
        flat = tree.flatten(params)
        adapt, train, _ = common.split(flat)
        space.check(adapt)
        trainable = starting(adapt, train)
        adam = () if sync == "none" else adam_state(tx.init(trainable))
        step = () if own or dense else jax.tree.map(jnp.zeros_like, trainable)
        bases = () if own else space.random(adapt, jax.random.fold_in(key, 0))
        return FedGaLoreState(flat, Extra(adam, bases, step, key), jnp.zeros((), jnp.int32))

    def broadcast(state):
        adapt, train, freeze = common.split(state.params)
        frozen = freeze if dense else freeze | adapt
        return Download(starting(adapt, train), frozen, state.extra, state.round)

    def assemble(download, trainable, extra):
        if dense:
            return tree.unflatten(download.frozen | trainable)
        rest = dict(trainable)
        shrink = rest.pop("shrink", None)

        def kernel(path, p):
            base, pair, c = download.frozen[path], space.factors(p, rest[path]), None
            if shrink is not None:
                c = jnp.broadcast_to(jax.lax.stop_gradient(shrink), base.shape[:-2])
            return Adapted(base, pair.a, pair.b, c)

        kernels = {path: kernel(path, p) for path, p in extra.items()}
        return tree.unflatten(download.frozen | rest | kernels)

    def start(download, client_state, ops):
        del client_state
        opt = tx.init(download.trainable)
        if sync != "none":
            opt = with_state(opt, download.extra.adam)
        if not own:
            return Local(download.trainable, opt, download.extra.basis)
        model = {k: v for k, v in download.trainable.items() if k != "shrink"} | download.frozen
        adapt, train, _ = common.split(model)

        def gradient(j):
            return ops.value_and_grad(lambda moved: tree.unflatten(model | moved), adapt | train, j)

        loss, grads = gradient(0)
        total = {path: grads[path] for path in adapt}
        for j in range(1, o.basis_batches):
            _, more = gradient(j)
            total = {path: g + more[path] for path, g in total.items()}
        bases = space.leading(total, ops.key, o.finder)
        if not dense:
            grads |= {path: space.projected(grads[path], p) for path, p in bases.items()}
            grads |= {path: jnp.zeros_like(x) for path, x in download.trainable.items() if path == "shrink"}
        return Local(download.trainable, opt, bases, (loss, grads))

    def finish(download, local, client_state, ops):
        del ops
        moved, adam = change(download, local), adam_state(local.opt)
        if own and not dense:
            moved |= {path: space.factors(p, moved[path]) for path, p in local.extra.items()}
        mean, stack = {"change": moved}, ()
        if sync != "none":
            nu = dict(adam.nu)
            if sync != "mean":
                stack = {path: nu.pop(path) for path in local.extra}
            mean["nu"] = nu
            if o.sync_first:
                mean["mu"] = adam.mu
        return Upload(mean=mean, stack=stack), client_state

    def synchronised(adam: WarmAdamState, upload, cohort):
        nu, ranks, rows = dict(upload.mean["nu"]), {}, dict(upload.stack or {})
        for paths in tree.by_shape(rows):
            synced, rank = synchronise(
                space.left(jnp.stack([rows[path] for path in paths], 1)),
                cohort.weights,
                method=sync,
                signal_rank=o.signal_rank,
                joint_rank=o.joint_rank,
                floor=o.floor,
                each_layer=placement.each_layer,
            )
            nu |= dict(zip(paths, space.left(synced), strict=True))
            if sync == "ajive":
                ranks |= {f"joint_rank/{path}": rank[i] for i, path in enumerate(paths)}
        count = adam.count_v + cohort.steps
        if not o.sync_first:
            return adam._replace(count_v=count, nu=nu), ranks
        return WarmAdamState(count, count, upload.mean["mu"], nu), ranks

    def refreshed(extra: Extra, change: Flat, done: Array) -> Extra:
        """New bases, and the moments in their coordinates."""
        key, adam = jax.random.fold_in(extra.seed, done // o.refresh_rounds), extra.adam
        bases: Any = ()
        if basis == "shared":
            bases = space.random(change, key)
        if basis == "server":
            bases = space.explored(change, key)
        if sync == "none":
            return extra._replace(basis=bases)
        mu, nu = dict(adam.mu), dict(adam.nu)
        for path in change:
            old: Any = None if own else extra.basis[path]
            new: Any = None if own else bases[path]
            nu[path] = space.left(transported(space.left(nu[path]), old, new, o.transport))
            if o.sync_first:
                mu[path] = space.rotated(mu[path], old, new)
        return extra._replace(basis=bases, adam=adam._replace(mu=mu, nu=nu))

    def aggregate(state, upload, cohort):
        params, extra, moved = dict(state.params), state.extra, dict(upload.mean["change"])
        step = () if own or dense else dict(moved)
        adapt, _, _ = common.split(params)
        shrunk = moved.pop("shrink", None)
        for path in adapt:
            if not own and not dense:
                moved[path] = merge(space.factors(extra.basis[path], moved[path]))
            if shrunk is not None:
                moved[path] = moved[path] + shrunk * params[path]
        params |= {path: (params[path] + d).astype(params[path].dtype) for path, d in moved.items()}
        metrics = {}
        if sync != "none":
            adam, metrics = synchronised(extra.adam, upload, cohort)
            extra = extra._replace(adam=adam)
        done = state.round + 1
        extra = jax.lax.cond(
            done % o.refresh_rounds == 0,
            lambda: refreshed(extra, {path: moved[path] for path in adapt}, done),
            lambda: extra,
        )
        return FedGaLoreState(params, extra._replace(step=step), done), metrics

    def export(state):
        return tree.unflatten(state.params)

    def wire_down(download):
        adam, bases, step, seed = download.extra
        if own or dense:
            model = download.trainable | download.frozen
            step = {path: model[path] for path in download.trainable}
        sent = {"step": step}
        if basis == "shared":
            sent["seed"] = seed
        if sync != "none":
            sent["nu"] = adam.nu
            if o.sync_first:
                sent["mu"] = adam.mu
        return with_basis(sent, bases)

    def missed(download):
        """What replays a round of the kernels; the head can come as it is, in place of its change.

        Own bases and dense weights come with the whole model anyway.
        """
        if own or dense:
            return ()
        step = {p: x for p, x in download.extra.step.items() if p == "shrink" or p in download.extra.basis}
        return with_basis(step, download.extra.basis)

    def with_basis(sent, bases):
        """What travels in as many rounds as a basis is kept, and the server's basis once in them."""
        return [sent] * wire_of, bases if basis == "server" else ()

    # A basis that is kept for a hundred rounds or more is next to nothing in each.
    wire_of = min(o.refresh_rounds, 100) if basis == "server" else 1

    return Strategy(
        init,
        broadcast,
        assemble,
        start,
        finish,
        aggregate,
        export,
        tx,
        wire_down=wire_down,
        wire_up=lambda upload: [upload] * wire_of,
        catch_up=missed,
        wire_of=wire_of,
        comparable=not own,
    )
