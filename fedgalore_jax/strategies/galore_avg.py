"""GaLore with direct averaging: local subspaces, averaged weights, no synchronised state.

Mahla et al., 2410.23111 [V2]: clients train with GaLore, and the server averages full weights. Ranks and
refreshes were not read; here each client's subspace is that of its own first gradients in a round [I]. It is
FedGaLore with basis=own and sync=none.

Ledger (m x n kernel, floats per client and round)
  trained         Z [r, n] of every adapt kernel in the client's own basis; train leaves in full
  frozen          the basis [m, r] during the round; freeze leaves
  down            mn
  up              r(m + n) (client_weights=factored), or mn (dense)
  kept by client  nothing
  re-initialised  the basis and both moments, every round
"""

from fedgalore_jax.strategies.base import Common, Strategy
from fedgalore_jax.strategies.fedgalore import fedgalore


def galore_avg(
    common: Common,
    *,
    client_weights: str = "factored",
    finder: str = "subspace",
    basis_batches: int = 1,
    side: str = "left",
) -> Strategy:
    """Builds GaLore with direct averaging.

    Args:
      common: options shared by all strategies.
      client_weights: "factored" or "dense", the same numbers; see `fedgalore`.
      finder: how a basis is found, one of `lowrank.FINDERS`; "svd" is galore_torch's.
      basis_batches: batches whose mean gradient gives the basis.
      side: "left" projects the input side of a kernel, "right" the output side.

    Returns:
      A `Strategy`.
    """
    return fedgalore(
        common,
        client_weights=client_weights,
        basis="own",
        sync="none",
        finder=finder,
        basis_batches=basis_batches,
        side=side,
    )
