"""FedLore: one projector for all clients in a round, low-rank uploads, no synchronised state.

As junkangLiu0/FedLore describes it in its README [V]: clients optimise in the coordinates of a shared P_t and
the server adds the mean change in the full space. (The code that could be read does something else, with own
bases.) How P_t is made was not stated: both choices are options [I]. It is FedGaLore with sync=none and a new
basis every round.

Ledger (m x n kernel, floats per client and round)
  trained         Z [r, n] of every adapt kernel in the shared basis; train leaves in full
  frozen          the basis [m, r]; freeze leaves
  down            rn (mean Z), and a seed (basis=shared) or mr (basis=server)
  up              rn (client_weights=dense: mn, down as well)
  kept by client  nothing (the base model; for each round that it missed, rn, and mr with basis=server)
  re-initialised  the basis and both moments, every round
"""

from fedgalore_jax.strategies.base import Common, Strategy, require
from fedgalore_jax.strategies.fedgalore import fedgalore

BASES = ("shared", "server")


def fedlore(
    common: Common, *, basis: str = "shared", client_weights: str = "factored", side: str = "left"
) -> Strategy:
    """Builds FedLore.

    Args:
      common: options shared by all strategies.
      basis: "shared" (random, from a seed) or "server" (half from the last mean change, half random).
      client_weights: "factored" or "dense", the same numbers; see `fedgalore`.
      side: "left" projects the input side of a kernel, "right" the output side.

    Returns:
      A `Strategy`.
    """
    require("basis", basis, basis in BASES, f"one of {', '.join(BASES)}")
    return fedgalore(
        common, client_weights=client_weights, basis=basis, sync="none", refresh_rounds=1, side=side
    )
