"""How a data set is split over clients. Pure NumPy; every function is deterministic in its `rng`."""

import numpy as np

PARTITIONS = ("dirichlet", "iid")
MIN_SIZE = 10


def partition(
    labels: np.ndarray,
    clients: int,
    *,
    kind: str,
    alpha: float,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """Splits samples over clients.

    Args:
      labels: `[n]` class of each sample.
      clients: N.
      kind: "iid" (equal shares of a shuffle) or "dirichlet" (label skew: each class is dealt to clients
        in proportions drawn from Dirichlet(alpha)).
      alpha: concentration; smaller is more skewed. Only "dirichlet" reads it.
      rng: the source of randomness.

    Returns:
      N arrays of sample indices; every sample is in exactly one of them. A client with fewer than
      `MIN_SIZE` samples (or `n // clients`, if that is less) is topped up with random ones of the largest.

    Raises:
      ValueError: more clients than samples, `alpha <= 0`, an unknown kind.

    References:
      Hsu et al., Measuring the effects of non-identical data distribution (1909.06335) [M].
    """
    if clients > len(labels):
        raise ValueError(f"clients={clients} but there are only {len(labels)} training samples")
    if kind not in PARTITIONS:
        raise ValueError(f"partition={kind!r} is not one of {', '.join(PARTITIONS)}")
    if kind == "iid":
        return [np.sort(part) for part in np.array_split(rng.permutation(len(labels)), clients)]
    if not alpha > 0:
        raise ValueError(f"alpha={alpha} must be positive: small values are skewed, large ones iid")
    dealt: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(clients, alpha))
        cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(int)
        for client, part in enumerate(np.split(members, cuts)):
            dealt[client].append(part)
    parts = [np.concatenate(part) for part in dealt]
    least = min(MIN_SIZE, len(labels) // clients)
    for client in range(clients):
        while (missing := least - len(parts[client])) > 0:
            largest = max(range(clients), key=lambda c: len(parts[c]))
            give = min(missing, len(parts[largest]) - least)
            parts[largest], given = np.split(rng.permutation(parts[largest]), [-give])
            parts[client] = np.concatenate([parts[client], given])
    return [np.sort(part) for part in parts]
