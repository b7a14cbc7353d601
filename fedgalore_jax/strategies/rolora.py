"""RoLoRA: federated LoRA whose rounds alternate between B and A, so that averaging is exact.

2502.01755 [V2]. The first round trains B: A has no gradient while B is zero. The other factor is the same
everywhere and stays. Parity is the round's, not a count of each client's own rounds; which factor learns is a
mask, so one program serves both.

Ledger (m x n kernel, floats per client and round)
  trained         B in rounds 0, 2, ..., A in rounds 1, 3, ...; train leaves in full
  frozen          every kernel, the other factor, freeze leaves
  down            rm or rn, in turn
  up              rm or rn, in turn
  kept by client  the other factor; a client that was away needs it as well, once: rm or rn, in turn
  re-initialised  both moments, every round [I] (held for both factors, those of one are zero)
"""

import math

import jax
import jax.numpy as jnp
import optax

from fedgalore_jax.corrections import keep_where
from fedgalore_jax.strategies.base import Common, Strategy, require
from fedgalore_jax.strategies.fedit import fedit
from fedgalore_jax.strategies.lora import factors_of, is_lora
from fedgalore_jax.types import LoRA


def rolora(common: Common, *, client: str = "adamw", b_ratio: float = 1.0) -> Strategy:
    """Builds RoLoRA.

    Args:
      common: options shared by all strategies.
      client: the clients' optimizer, "adamw" or "sgd".
      b_ratio: learning rate of B as a multiple of A's.

    Returns:
      A `Strategy`.
    """
    require("b_ratio", b_ratio, 0 < b_ratio < math.inf, "a positive, finite number")
    mask = keep_where("active")

    def faster_b(updates, params):
        del params
        return {path: LoRA(u.a, b_ratio * u.b) if is_lora(u) else u for path, u in updates.items()}

    tx = optax.chain(mask, common.optimizer(client), mask, optax.stateless(faster_b))
    base = fedit(common, tx)

    def in_turn(flat, round):
        """1 for the factor in turn and for plainly trained leaves, 0 for the other factor."""
        odd = (round % 2).astype(jnp.float32)
        return {path: LoRA(odd, 1 - odd) if is_lora(leaf) else jnp.ones(()) for path, leaf in flat.items()}

    def start(download, client_state, ops):
        active = in_turn(download.trainable, download.round)
        return base.start(download, client_state, ops)._replace(extra={"active": active})

    def aggregate(state, upload, cohort):
        """As FedIT; where privacy puts noise on every change, that on the resting factor goes nowhere."""
        change = upload.mean["change"]
        change = jax.tree.map(jnp.multiply, change, in_turn(change, state.round))
        return base.aggregate(state, upload._replace(mean={"change": change}), cohort)

    def two_rounds(trainable):
        """One factor in each, and the plainly trained leaves in both."""
        factors, rest = factors_of(trainable)
        return factors, rest, rest

    return base._replace(
        start=start,
        aggregate=aggregate,
        wire_down=lambda download: two_rounds(download.trainable),
        wire_up=lambda upload: two_rounds(upload.mean["change"]),
        catch_up=lambda download: factors_of(download.trainable)[0],
        catch_up_once=True,
        wire_of=2,
    )
