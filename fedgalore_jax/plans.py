"""The rounds ahead: who takes part in each, with which samples, and what befalls them."""

import jax
import numpy as np

from fedgalore_jax.config import Config
from fedgalore_jax.data import FederatedData, Plan, faults


def plan(config: Config, chunk: int, federation: FederatedData, rounds: range, size: int = 0) -> Plan:
    """The plan of some rounds, padded to the size of a block if given: every call has the same shapes."""
    args = (config.participants, config.local_steps, config.batch_size, chunk)
    rows = federation.plan(rounds, *args)
    if config.client_dropout:
        rows = faults.without(rows, rounds, config.seed, config.client_dropout)
    if config.straggler and config.deadline:
        rows = faults.late(rows, rounds, config.seed, config.straggler, config.deadline)
    return jax.tree.map(lambda field: np.resize(field, (size or len(rounds), *field.shape[1:])), rows)
