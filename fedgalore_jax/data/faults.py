"""Clients that drop out of a round, and clients that are late for its end."""

import math

import numpy as np

from fedgalore_jax.data.federated import DROPOUT, SPEED, Plan

_LAWS = {
    "exponential": ("MEAN", lambda rng, mean: rng.exponential(mean)),
    "lognormal": ("MEDIAN:SIGMA", lambda rng, median, sigma: median * rng.lognormal(0.0, sigma)),
    "uniform": ("LOW:HIGH", lambda rng, low, high: rng.uniform(min(low, high), max(low, high))),
}
LAWS = tuple(f"{name}:{values}" for name, (values, _) in _LAWS.items())
"""The laws of a straggler's time, as they are written."""


def without(plan: Plan, rounds: range, seed: int, chance: float) -> Plan:
    """The plan where each client drops out of each round with a chance.

    It was sent the model, and sends nothing: its count is 0. All may drop out.
    """
    drawn = [
        [np.random.default_rng([seed, DROPOUT, t, client]).random() for client in ids]
        for t, ids in zip(rounds, plan.ids, strict=True)
    ]
    return plan._replace(counts=np.where(np.array(drawn) < chance, 0, plan.counts))


def late(plan: Plan, rounds: range, seed: int, law: str, deadline: float) -> Plan:
    """The plan where clients do the local steps that they get to.

    Args:
      plan: of these rounds.
      rounds: which.
      seed: of the run.
      law: of the time that a local step takes a client in a round, drawn anew each round: one of `LAWS`.
      deadline: of the round, in the same unit.

    Returns:
      The plan with `steps`; a client that gets to none is absent.

    Raises:
      ValueError: an unknown law, or numbers that are none of its.
    """
    draw = time_of(law)
    steps = np.full(plan.ids.shape, plan.samples.shape[2], np.int32)
    for r, t in enumerate(rounds):
        for c, client in enumerate(plan.ids[r]):
            time = draw(np.random.default_rng([seed, SPEED, t, client]))
            steps[r, c] = min(steps[r, c], deadline / max(time, 1e-12))
    return plan._replace(counts=np.where(steps > 0, plan.counts, 0), steps=np.maximum(steps, 1))


def time_of(law: str):
    """`(rng) -> time` of a law."""
    name, *values = law.split(":")
    wanted, draw = _LAWS.get(name, ("", None))
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        numbers = []
    fits = len(numbers) == len(wanted.split(":")) and all(0 < x < math.inf for x in numbers)
    if draw is None or not fits:
        raise ValueError(f"straggler={law!r} is not usable: give {', '.join(LAWS)}, with positive numbers")
    return lambda rng: draw(rng, *numbers)
