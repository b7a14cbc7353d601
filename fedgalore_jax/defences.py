"""From a `Config` to what the server does with clients that are late, wrong or to be hidden."""

from fedgalore_jax import aggregators, privacy, strategies
from fedgalore_jax.config import Config
from fedgalore_jax.strategies.base import Strategy


def aggregator(config: Config, strategy: Strategy) -> aggregators.Aggregator:
    """How the server makes one upload of a round's.

    Raises:
      ValueError: the method's uploads are nothing that it could do this with.
      ImportError: what privacy costs cannot be accounted for here.
    """
    if config.aggregator != "mean" and not strategy.comparable:
        raise ValueError(
            f"aggregator={config.aggregator!r} compares clients entry by entry, and {config.method} (with"
            " these options) sends bases, ranks, layers or factors of a client's own: give mean"
        )
    if config.straggler and "base" in strategies.options(config.method):
        raise ValueError(f"straggler={config.straggler!r}: {config.method} has stragglers of its own")
    if config.dp_clip is not None and config.dp_noise is not None:
        if strategy.personal:
            raise ValueError(
                f"dp_clip={config.dp_clip!r}: {config.method} has a model per client, parts of which no noise"
                " covers: give a method with one model"
            )
        guarantee(config)
        return aggregators.Aggregator(clip=config.dp_clip, noise=config.dp_noise)
    return aggregators.build(config.aggregator, config.trim)


def guarantee(config: Config) -> privacy.Guarantee | None:
    """What the run promises its clients, None where nothing hides their part.

    Raises:
      ImportError: it cannot be accounted for here.
    """
    if config.dp_noise is None:
        return None
    sizes = {"rounds": config.rounds, "clients": config.clients, "cohort": config.participants}
    return privacy.guarantee(**sizes, noise=config.dp_noise)
