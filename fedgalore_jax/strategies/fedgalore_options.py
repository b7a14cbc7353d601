"""FedGaLore's options: what may be chosen, what follows from what, and what contradicts what."""

from typing import NamedTuple

from fedgalore_jax.lowrank import FINDERS
from fedgalore_jax.shared_signal import METHODS
from fedgalore_jax.strategies.subspaces import SIDES, TRANSPORTS

CLIENT_WEIGHTS = ("factored", "dense")
BASES = ("shared", "server", "own")
SYNCS = ("none", *METHODS)


class Options(NamedTuple):
    """`fedgalore`'s keyword arguments under their names, as they are after `resolve`."""

    client_weights: str
    basis: str
    refresh_rounds: int
    finder: str
    basis_batches: int
    side: str
    sync: str
    sync_first: bool
    transport: str
    signal_rank: int
    joint_rank: int | None
    floor: float


def resolve(given: Options, rank: int) -> Options:
    """Checks what was given and fills in what was left to default.

    Args:
      given: the arguments as they were given; None is "by default".
      rank: r.

    Raises:
      ValueError: an unknown name, an option without effect, or options that contradict each other.
    """
    own = given.basis == "own"
    _refuse_idle(given)
    defaults = {
        "refresh_rounds": 1 if own else 5,
        "finder": "subspace",
        "basis_batches": 1,
        "sync_first": not own and given.sync != "none",
        "transport": "row_mean" if own else "keep",
        "signal_rank": max(1, rank // 2),
        "floor": 1e-3,
    }
    o = given._replace(**{name: v for name, v in defaults.items() if getattr(given, name) is None})
    _refuse_unknown(o)
    ajive, k = o.sync == "ajive", o.signal_rank
    for wrong, message in (
        (o.refresh_rounds < 1, f"refresh_rounds={o.refresh_rounds} must be at least 1"),
        (o.basis_batches < 1, f"basis_batches={o.basis_batches} must be at least 1"),
        (
            o.basis == "server" and rank < 2,
            f"rank={rank}: a server basis has learned and random columns, give >= 2",
        ),
        (
            own and o.refresh_rounds != 1,
            f"refresh_rounds={o.refresh_rounds}: own bases are new every round, give 1",
        ),
        (own and o.sync_first, "sync_first=True needs a common basis: not with basis='own'"),
        (
            own and o.transport == "squared_overlap",
            "transport='squared_overlap' needs a common old basis: not with basis='own'",
        ),
        (ajive and rank < 2, f"rank={rank} leaves AJIVE no room: give rank >= 2, or sync=mean"),
        (ajive and not 1 <= k < rank, f"signal_rank={k} must lie in 1..rank-1 (rank={rank})"),
        (
            o.joint_rank is not None and not 0 <= o.joint_rank <= k,
            f"joint_rank={o.joint_rank} must lie in 0..signal_rank ({k})",
        ),
        (not 0 <= o.floor < 1, f"floor={o.floor} is not usable: give a share from 0 to below 1"),
    ):
        if wrong:
            raise ValueError(message)
    return o


def _refuse_idle(given: Options) -> None:
    """An option that would have no effect is a mistake of whoever gave it."""
    for used, names, needed in (
        (given.sync == "ajive", ("signal_rank", "joint_rank", "floor"), "sync=ajive"),
        (given.basis == "own", ("finder", "basis_batches"), "basis=own"),
        (given.sync != "none", ("sync_first", "transport"), "a sync that is not none"),
    ):
        for name in names:
            if not used and (value := getattr(given, name)) is not None:
                raise ValueError(f"{name}={value!r} would have no effect: it needs {needed}")


def _refuse_unknown(options: Options) -> None:
    for name, accepted in (
        ("client_weights", CLIENT_WEIGHTS),
        ("basis", BASES),
        ("finder", FINDERS),
        ("side", SIDES),
        ("sync", SYNCS),
        ("transport", TRANSPORTS),
    ):
        if (value := getattr(options, name)) not in accepted:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(accepted)}")
