"""How a training set is split over clients. Pure NumPy; every function is deterministic in its `rng`."""

from collections.abc import Sequence

import numpy as np

PARTITIONS = ("dirichlet", "domain", "domain+dirichlet", "iid", "quantity", "shards")
MIN_SIZE = 10


def partition(
    classes: np.ndarray,
    clients: int,
    *,
    kind: str,
    alpha: float,
    rng: np.random.Generator,
    domains: np.ndarray | None = None,
    shards: int = 2,
    sigma: float = 1.0,
) -> list[np.ndarray]:
    """Splits samples over clients.

    Args:
      classes: `[n]` class of each sample.
      clients: N.
      kind: one of
        "iid": equal shares of a shuffle;
        "dirichlet": label skew; each class is dealt in proportions drawn from Dirichlet(alpha);
        "shards": label skew; samples sorted by class are cut into `shards * N` equal pieces, and every
          client gets `shards` of them at random;
        "quantity": iid contents, sizes in proportion to draws from a log-normal;
        "domain": every client belongs to one domain; a domain has clients in proportion to its size, and
          deals them equal shares. With as many clients as domains it is the data's own split;
        "domain+dirichlet": the same, but a domain deals its clients by "dirichlet".
      alpha: concentration of "dirichlet"; smaller is more skewed.
      rng: the source of randomness.
      domains: `[n]` natural key of each sample, integers from 0 on.
      shards: pieces, and so nearly classes, of a client of "shards".
      sigma: standard deviation of the logarithm of sizes of "quantity".

    Returns:
      N sorted arrays of sample indices; every sample is in exactly one, none is empty. Under "dirichlet" and
      "quantity" a client with fewer than `MIN_SIZE` samples (or an equal share, if that is less) is topped up
      with random ones of the largest.

    Raises:
      ValueError: fewer samples, domains or shards than the clients need; a bad `alpha`, `sigma` or kind.

    References:
      dirichlet: Hsu et al., Measuring the effects of non-identical data distribution (1909.06335) [M].
      shards: McMahan et al., Communication-efficient learning of deep networks (1602.05629) [M].
    """
    n = len(classes)
    if kind not in PARTITIONS:
        raise ValueError(f"partition={kind!r} is not one of {', '.join(PARTITIONS)}")
    if clients > n:
        raise ValueError(f"clients={clients} but there are only {n} training samples")
    if "dirichlet" in kind and not alpha > 0:
        raise ValueError(f"alpha={alpha} must be positive: small values are skewed, large ones iid")
    if kind == "dirichlet":
        parts = _dirichlet(classes, clients, alpha, rng)
    elif kind == "shards":
        parts = _shards(classes, clients, shards, rng)
    elif kind == "quantity":
        parts = _quantity(n, clients, sigma, rng)
    elif kind == "iid":
        parts = np.array_split(rng.permutation(n), clients)
    else:
        parts = _domains(classes, clients, domains, alpha if "dirichlet" in kind else None, rng)
    return [np.sort(part) for part in parts]


def _dirichlet(classes: np.ndarray, clients: int, alpha: float, rng: np.random.Generator) -> list[np.ndarray]:
    dealt: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for label in np.unique(classes):
        members = rng.permutation(np.flatnonzero(classes == label))
        shares = rng.dirichlet(np.full(clients, alpha))
        cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(int)
        for client, part in enumerate(np.split(members, cuts)):
            dealt[client].append(part)
    return _top_up([np.concatenate(part) for part in dealt], rng)


def _top_up(parts: list[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    """Gives small clients samples of the largest, until all have the least size."""
    least = min(MIN_SIZE, sum(map(len, parts)) // len(parts))
    for client in range(len(parts)):
        while (missing := least - len(parts[client])) > 0:
            largest = max(range(len(parts)), key=lambda c: len(parts[c]))
            give = min(missing, len(parts[largest]) - least)
            parts[largest], given = np.split(rng.permutation(parts[largest]), [-give])
            parts[client] = np.concatenate([parts[client], given])
    return parts


def _shards(classes: np.ndarray, clients: int, shards: int, rng: np.random.Generator) -> list[np.ndarray]:
    pieces = clients * shards
    if not 1 <= pieces <= len(classes):
        raise ValueError(f"shards={shards}: {clients} clients need {pieces} of {len(classes)} samples")
    shuffled = rng.permutation(len(classes))
    by_class = shuffled[np.argsort(classes[shuffled], kind="stable")]
    cut = np.array_split(by_class, pieces)
    return [np.concatenate([cut[i] for i in own]) for own in rng.permutation(pieces).reshape(clients, shards)]


def _quantity(n: int, clients: int, sigma: float, rng: np.random.Generator) -> list[np.ndarray]:
    if not 0 <= sigma < np.inf:
        raise ValueError(f"sigma={sigma} must be finite and not negative: 0 gives equal sizes")
    logarithms = rng.standard_normal(clients)
    sizes = np.exp(sigma * (logarithms - logarithms.max()))  # shares alone count, and none overflows
    cuts = np.round(np.cumsum(sizes / sizes.sum())[:-1] * n).astype(int)
    return _top_up(np.split(rng.permutation(n), cuts), rng)


def _domains(
    classes: np.ndarray,
    clients: int,
    domains: np.ndarray | None,
    alpha: float | None,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    if domains is None:
        raise ValueError(
            "partition='domain': this data has no domains; set --client_column, or choose another partition"
        )
    sizes = np.unique(domains, return_counts=True)[1]
    if clients < len(sizes):
        raise ValueError(f"clients={clients} but there are {len(sizes)} domains: give one each at least")
    # One client each, the others one by one to the domain with the most samples a client.
    shares = np.ones(len(sizes), int)
    for _ in range(clients - len(sizes)):
        shares[np.argmax(np.where(shares < sizes, sizes / shares, -1.0))] += 1
    parts: list[np.ndarray] = []
    for domain, share in zip(np.unique(domains), shares, strict=True):
        members = np.flatnonzero(domains == domain)
        if alpha is None:
            parts += np.array_split(rng.permutation(members), share)
        else:
            parts += [members[part] for part in _dirichlet(classes[members], share, alpha, rng)]
    return parts


def counts(parts: Sequence[np.ndarray], keys: np.ndarray) -> np.ndarray:
    """How many samples of each key each client has, `[N, keys]`."""
    width = int(keys.max()) + 1
    return np.stack([np.bincount(keys[part], minlength=width) for part in parts])


def owners(
    labels: np.ndarray, parts: Sequence[np.ndarray], classes: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Deals samples of another split to clients as training data were dealt, for models of their own.

    Args:
      labels: `[n]` classes of the split.
      parts: the clients' training samples.
      classes: `[n_train]`.
      rng: the source of randomness.

    Returns:
      `[n]` clients; a sample goes to a client with a chance in proportion to its training samples of that
      class, or of all where nobody has any of that class.
    """
    by_class, sizes = counts(parts, classes), np.array([len(part) for part in parts])
    chosen = np.empty(len(labels), int)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        own = by_class[:, label] if label < by_class.shape[1] else 0 * sizes
        own = own if own.any() else sizes
        chosen[rows] = rng.choice(len(parts), len(rows), p=own / own.sum())
    return chosen


def table(
    parts: Sequence[np.ndarray],
    classes: np.ndarray,
    domains: np.ndarray | None = None,
    names: Sequence[str] = (),
) -> str:
    """A partition in twelve lines at most, whatever N.

    Args:
      parts: the clients' samples.
      classes: `[n]`.
      domains: `[n]`, or None.
      names: of the domains.

    Returns:
      A line a client, smallest first (evenly spaced ones where there are many): its size, how many classes
      it has, the most frequent one's share, and its domains. Last, the whole.
    """
    sizes = np.array([len(part) for part in parts])
    order = np.argsort(sizes, kind="stable")
    shown = order[np.unique(np.linspace(0, len(order) - 1, min(10, len(order))).round().astype(int))]
    by_class = counts(parts, classes)
    lines = [f"{'client':>8}{'samples':>9}{'classes':>9}{'largest':>9}" + "  domains" * (domains is not None)]
    for client in shown:
        row = by_class[client]
        line = f"{client:>8}{sizes[client]:>9}{(row > 0).sum():>9}{row.max() / sizes[client]:>9.0%}"
        if domains is not None:
            own = np.unique(domains[parts[client]])
            text = ", ".join(str(names[d]) if names else str(d) for d in own[:4])
            line += f"  {text}" + f" and {len(own) - 4} more" * (len(own) > 4)
        lines.append(line)
    present = (by_class > 0).sum(1)
    spread = f"{sizes.min()}-{sizes.max()} samples (median {np.median(sizes):g})"
    lines.append(f"{len(parts)} clients: {spread} of {present.min()}-{present.max()} classes each")
    return "\n".join(lines)
