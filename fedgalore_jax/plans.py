"""The rounds ahead: who takes part in each, with which samples, and what befalls them."""

import jax
import numpy as np

from fedgalore_jax.config import Config
from fedgalore_jax.data import FederatedData, Plan, faults

BLOCK = 50
"""Most rounds in one compiled call."""


def block_size(config: Config) -> int:
    """Rows of a plan: rounds between evaluations, which run in one call."""
    return min(config.eval_every, BLOCK, config.rounds)


def plan(config: Config, chunk: int, federation: FederatedData, rounds: range) -> Plan:
    """The plan of some rounds, padded to the rows of a block: every call has the same shapes."""
    args = (config.participants, config.local_steps, config.batch_size, chunk)
    rows, size = federation.plan(rounds, *args), block_size(config)
    if config.client_dropout:
        rows = faults.without(rows, rounds, config.seed, config.client_dropout)
    if config.straggler and config.deadline:
        rows = faults.late(rows, rounds, config.seed, config.straggler, config.deadline)
    return jax.tree.map(lambda field: np.resize(field, (size, *field.shape[1:])), rows)
