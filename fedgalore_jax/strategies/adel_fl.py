"""ADEL-FL's stragglers, around any method: a client sends the layers that it has finished by a deadline.

2505.23973 [V2]: compute times are exponential, and the server's layer-wise mean is unbiased. Backward passes
run from the last layer to the first, so that a client out of time has finished the last ones only [M]. In
the rule that it builds on (SALF [M]) the mean over those that finished a layer is divided by the chance that
anyone did, which is unbiased where clients have one speed and one weight. Here they have not, and each
client's change of a layer is divided by that client's own chance to finish it [I]: unbiased for what the
server adds up, whatever the speeds and weights, as long as no chance is below `min_chance`. One draw holds
for a round's local steps [I]; the paper's choice of deadlines and batch sizes is left to the user.

Ledger (m x n kernel, floats per client and round)
  trained         as the base method
  frozen          as the base method
  down            as the base method
  up              the base method's, of the layers finished (bytes: as if all were)
  kept by client  as the base method; what belongs to a layer that was not finished stays as it was
  re-initialised  as the base method
"""

import math

import jax
import jax.numpy as jnp

from fedgalore_jax.optimizer import WarmAdamState
from fedgalore_jax.strategies.base import Strategy, require
from fedgalore_jax.types import Array, LowRank, Tree

_STATE = ("mu", "nu")  # means of Adam's moments: no changes, so nothing can stand for one that is late [I]


def adel_fl(
    base: Strategy,
    *,
    deadline: float = 1.5,
    speeds: tuple[float, ...] = (0.5, 1.0, 2.0),
    min_chance: float = 0.1,
) -> Strategy:
    """Puts a deadline on the clients of a method.

    Args:
      base: the method; what it uploads may not be stacked.
      deadline: of a round's work, in units of the mean time in which a client of speed 1 does all layers.
      speeds: of the clients, cycled over their ids. The time of each layer is exponential, with mean
        1 / (speed * layers); the head takes none, embeddings that are trained are one layer more.
      min_chance: a chance below it counts as this much: less variance, and a bias towards no change.

    Returns:
      A `Strategy` whose metrics have `finished`, the share of layers.

    Raises:
      ValueError: when a round is traced, for a base with stacked uploads or kept moments, or a model without
        stacked layers.
    """
    require("deadline", deadline, 0 < deadline < math.inf, "a positive, finite number")
    require("speeds", speeds, bool(speeds) and all(0 < s < math.inf for s in speeds), "positive numbers")
    require("min_chance", min_chance, 0 < min_chance <= 1, "a number in (0, 1]")

    def drawn(layers: int, client: Array, key: Array) -> tuple[Array, Array]:
        """Whether the client finishes 1, ..., layers + 1 layers, and its chances to."""
        budgets = [speed * layers * deadline for speed in speeds]  # in mean times of one layer
        chances = jnp.array([[_chance(k + 1, mean) for k in range(layers + 1)] for mean in budgets])
        mine = client % len(speeds)
        times = jax.random.exponential(jax.random.fold_in(key, 0), (layers + 1,)).cumsum()
        return times <= jnp.array(budgets)[mine], chances[mine]

    def finish(download, local, client_state, ops):
        upload, memory = base.finish(download, local, client_state, ops)
        if jax.tree.leaves(upload.stack):
            raise ValueError("the base of adel_fl sends uploads that are stacked: choose another base")
        if any(map(_is_adam, jax.tree.leaves(memory, is_leaf=_is_adam))):
            raise ValueError(
                "adel_fl: kept moments count steps that late layers did not take: give moments=reset"
            )
        done, chance = drawn(_depth(download.trainable | download.frozen), ops.id, ops.key)
        share = done / jnp.maximum(chance, min_chance)
        mean = {
            name: sent if name in _STATE else _by_layer(sent, share) for name, sent in upload.mean.items()
        }
        mean |= {"finished": done[:-1].mean(dtype=share.dtype)}
        kept = _by_layer(memory, done, client_state)
        return upload._replace(mean=mean, sum=_by_layer(upload.sum, done)), kept

    def without(upload):
        """The base's upload."""
        mean = {name: sent for name, sent in upload.mean.items() if name != "finished"}
        return upload._replace(mean=mean)

    def aggregate(state, upload, cohort):
        state, metrics = base.aggregate(state, without(upload), cohort)
        return state, metrics | {"finished": upload.mean["finished"]}

    return base._replace(
        finish=finish,
        aggregate=aggregate,
        wire_up=lambda upload: base.wire_up(without(upload)),
        comparable=False,
    )


def _is_adam(leaf: Tree) -> bool:
    return isinstance(leaf, WarmAdamState)


def _chance(count: int, mean: float) -> float:
    """The chance that a Poisson variable of that mean is at least `count`."""
    return 1 - sum(math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) for k in range(count))


def _depth(flat) -> int:
    """How many layers a model has."""
    for path, leaf in flat.items():
        if path.startswith("layers/"):
            return jax.tree.leaves(leaf)[0].shape[0]
    raise ValueError("adel_fl needs a model whose layers are stacked, at layers/: choose another --model")


def _by_layer(tree: Tree, factors: Array, otherwise: Tree = None) -> Tree:
    """Multiplies what belongs to a layer, by the path it is found under, with the layer's factor.

    Args:
      tree: leaves under paths of parameters; others stay.
      factors: `[layers + 1]`, of the last layer (and the head), ..., the first, the embeddings. Where there
        is an `otherwise`, booleans.
      otherwise: a tree like `tree`, whose leaves stand in where a factor is False.
    """

    def one(keys, leaf, *old):
        path = next((key.key for key in keys if "/" in str(getattr(key, "key", ""))), None)
        if path is None:
            return leaf
        factor = factors[-1] if path.startswith("embeddings/") else factors[0]
        if path.startswith("layers/"):
            factor = factors[-2::-1].reshape(-1, *(1 for _ in leaf.shape[1:]))
        factor = jnp.broadcast_to(factor, leaf.shape)
        return jnp.where(factor, leaf, old[0]) if old else leaf * factor.astype(leaf.dtype)

    def pair(keys, leaf, *old):
        if isinstance(leaf, LowRank):
            return leaf._replace(b=one(keys, leaf.b))  # the product is what changes
        return one(keys, leaf, *old)

    rest = () if otherwise is None else (otherwise,)
    return jax.tree.map_with_path(pair, tree, *rest, is_leaf=lambda leaf: isinstance(leaf, LowRank))
