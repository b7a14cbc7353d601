"""What client-level DP-FedAvg promises, through the one door to dp-accounting."""

import functools
from typing import NamedTuple


class Guarantee(NamedTuple):
    """A promise to each client.

    Attributes:
      epsilon, delta: as differential privacy has them.
      assumes: what they hold under.
    """

    epsilon: float
    delta: float
    assumes: str


@functools.cache
def guarantee(*, rounds: int, clients: int, cohort: int, noise: float) -> Guarantee:
    """What a whole run promises; the delta is the smaller of 1e-5 and N ** -1.1.

    Replacing a client moves the sum of changes by twice the bound on one, so the accountant is given half the
    noise multiplier. It composes Rényi divergences over the rounds; sampling of a fixed size without
    replacement amplifies less than the Poisson sampling that is often assumed in its place.

    Args:
      rounds: of the run.
      clients: N.
      cohort: C.
      noise: standard deviation of the noise on the sum, in multiples of the bound on one client's change.

    Raises:
      ImportError: dp-accounting is not installed.

    References:
      McMahan et al., Learning differentially private recurrent language models (1710.06963) [M].
      Wang et al., Subsampled Rényi differential privacy (1808.00087), theorem 27 [V2].
    """
    try:
        import dp_accounting
        from dp_accounting import rdp
    except ImportError as error:
        raise ImportError("dp_noise is accounted for by dp-accounting: pip install dp-accounting") from error
    once, delta = dp_accounting.GaussianDpEvent(noise / 2), min(1e-5, clients**-1.1)

    def epsilon(event):
        accountant = rdp.RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE)
        return float(accountant.compose(event, rounds).get_epsilon(delta))

    # Who is drawn with others for a round is never hidden less than who is in all; the bound may say so.
    drawn = dp_accounting.SampledWithoutReplacementDpEvent(clients, cohort, once)
    return Guarantee(
        min(epsilon(once), epsilon(drawn)),
        delta,
        f"of the model, not of metrics.jsonl; another federation may differ in all data of one of {clients}"
        f" clients; each round draws {cohort} without replacement, and nobody sees draws (nor the seed, which"
        " they follow from), checkpoints (which hold the key of the noise) or uploads",
    )
