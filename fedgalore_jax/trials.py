"""Runs that differ in learning rate and seed alone, as one compiled program."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from fedgalore_jax.config import Config
from fedgalore_jax.loading import load_model
from fedgalore_jax.prepare import Prepared, federate, prepare


class Trials(NamedTuple):
    """Many runs of one method; called with `lr` and `seed` it prepares one of them.

    Attributes:
      shared: what is the same for all.
      compiled: makes their program; the first of them that is run compiles for all.
    """

    shared: Prepared
    compiled: Callable[[], Any]

    def __call__(self, lr: float, seed: int) -> Prepared:
        """The run with that learning rate and seed."""
        shared, own = self.shared, dataclasses.replace(self.shared.config, lr=lr, seed=seed)
        federation = federate(own, shared.loaded.dataset)
        _, params = load_model(own, shared.task, shared.loaded.dataset, shared.machine.mesh)
        return shared._replace(
            config=own,
            federation=federation,
            loaded=shared.loaded._replace(params=params),
            compile=lambda: functools.partial(self.compiled(), lr),
        )


def trials(config: Config, beside: Prepared | None = None) -> Trials:
    """Prepares a method for many runs.

    Args:
      config: of all of them, but for `lr` and `seed`.
      beside: runs that differ in their method alone, whose data these take.

    Raises:
      ValueError: as `prepare`.
    """
    config = dataclasses.replace(config, lr=1.0, out_dir=None)
    shared = prepare(config, beside=beside, any_trial=True)
    return Trials(shared, functools.cache(shared.compile))
