"""Runs that differ in learning rate and seed alone, as one compiled program."""

import dataclasses
import functools
from collections.abc import Callable

from fedgalore_jax.config import Config
from fedgalore_jax.loading import load_model
from fedgalore_jax.prepare import Prepared, federate, prepare


def trials(config: Config) -> Callable[[float, int], Prepared]:
    """Prepares a method for many runs.

    Args:
      config: of all of them, but for `lr` and `seed`.

    Returns:
      `trial(lr, seed) -> Prepared`; the first of them that is run compiles for all.

    Raises:
      ValueError: as `prepare`.
    """
    shared = prepare(dataclasses.replace(config, lr=1.0, out_dir=None), any_trial=True)
    compiled = functools.cache(shared.compile)

    def trial(lr: float, seed: int) -> Prepared:
        own = dataclasses.replace(shared.config, lr=lr, seed=seed)
        federation = federate(own, shared.loaded.dataset)
        _, params = load_model(own, shared.task, shared.loaded.dataset, shared.machine.mesh)
        return shared._replace(
            config=own,
            federation=federation,
            loaded=shared.loaded._replace(params=params),
            compile=lambda: functools.partial(compiled(), lr),
        )

    return trial
