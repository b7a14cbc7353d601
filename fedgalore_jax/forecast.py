"""What a run would take, said by its compiled program before anything runs."""

import math
from typing import Any, NamedTuple

import jax

from fedgalore_jax import engine, tree
from fedgalore_jax.prepare import Prepared


class Forecast(NamedTuple):
    """What a run would take.

    Attributes:
      method: its strategy.
      wire: costs of one client.
      traffic: bytes that all clients send and receive in all rounds, those for missed rounds aside.
      flops: floating-point operations of a round's matrix products, of all devices together.
      memory: bytes that each device holds while a round runs.
    """

    method: str
    wire: engine.Wire
    traffic: int
    flops: float
    memory: int


def forecast(prepared: Prepared) -> Forecast:
    """Compiles a run and asks its program; what it compiled is what the run will find in the cache.

    Args:
      prepared: the run.
    """
    config, wire = prepared.config, prepared.wire
    needs = prepared.compile().memory_analysis()
    # The weights that it began with stay; the state shares those that no round changes.
    shared = {id(leaf) for leaf in jax.tree.leaves(prepared.frozen) if tree.wide(leaf) is leaf}
    kept = sum(_here(leaf) for leaf in jax.tree.leaves(prepared.loaded.params) if id(leaf) not in shared)
    best = needs.output_size_in_bytes if config.keep == "best" else 0
    memory = needs.argument_size_in_bytes + needs.temp_size_in_bytes + needs.output_size_in_bytes
    traffic = config.rounds * config.participants * (wire.up + wire.down)
    return Forecast(config.method, wire, traffic, flops(prepared.traced.jaxpr), memory + kept + best)


def flops(jaxpr: Any) -> float:
    """Floating-point operations of the matrix products and convolutions in a traced program.

    A loop counts as often as it is known to turn; one whose turns are only known as it runs, as that over the
    rounds of a block, counts once. Attention by cuDNN is a kernel of its own and not counted.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        inner = [leaf for leaf in jax.tree.leaves(eqn.params, is_leaf=_is_jaxpr) if _is_jaxpr(leaf)]
        counts = [flops(one) for one in inner]
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            summed = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * summed
        elif eqn.primitive.name == "conv_general_dilated":
            kernel, outputs = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec[0]
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // kernel[outputs]
        elif eqn.primitive.name == "cond":
            total += max(counts)
        else:
            total += eqn.params.get("length", 1) * sum(counts) if counts else 0
    return total


def _is_jaxpr(leaf: Any) -> bool:
    return hasattr(leaf, "eqns")


def _here(leaf: jax.Array) -> int:
    """Bytes of an array on one device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
