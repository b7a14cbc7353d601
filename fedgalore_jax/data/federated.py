"""Which clients take part in a round and which of their samples each step sees.

Host side and NumPy only: what leaves this module is small integer arrays; samples are gathered on the
device. All randomness is `np.random.default_rng([seed, purpose, ...])`, the counter-based sibling of
`jax.random.fold_in`: round 17 of client 3 is the same whatever ran before it.
"""

from typing import NamedTuple

import numpy as np

PARTITION, COHORT, BATCHES, OWNERS, DROPOUT, SPEED = range(6)
"""Purposes, so that no two choices share a stream."""


class Plan(NamedTuple):
    """The clients and samples of R consecutive rounds.

    Attributes:
      ids: `[R, C]` int32, clients of each round; N for padding.
      samples: `[R, C, K, B]` int32, rows of the training set; of its client's, where one has fewer than B.
      weight: `[R, C, B]` float32, 0 for the padding of a client that has fewer samples than B.
      counts: `[R, C]` int32, samples of each client; 0 for padding, and for one that sends nothing.
      slots: `[R, C]` int32, where the memory of each client is: at its id.
      steps: `[R, C]` int32, local steps that each client gets to; None where all do K.
    """

    ids: np.ndarray
    samples: np.ndarray
    weight: np.ndarray
    counts: np.ndarray
    slots: np.ndarray
    steps: np.ndarray | None = None


class FederatedData(NamedTuple):
    """A training set split over clients.

    Attributes:
      parts: N arrays of sample indices.
      seed: of all choices below.
    """

    parts: list[np.ndarray]
    seed: int

    def plan(self, rounds: range, cohort: int, steps: int, batch_size: int, multiple_of: int = 1) -> Plan:
        """Draws cohorts and batches.

        A cohort is drawn uniformly without replacement; aggregation then weighs by sample counts. Each
        client walks through its own samples in shuffled epochs; an epoch that ends inside a batch wraps
        around into the next one. A client with fewer samples than B sees all of them in every batch.

        Args:
          rounds: which rounds.
          cohort: C, clients per round.
          steps: K, local steps.
          batch_size: B.
          multiple_of: the cohort is padded with empty clients to a multiple of this (the chunk).

        Returns:
          A `Plan` whose C is padded.
        """
        padded = -(-cohort // multiple_of) * multiple_of
        shape = (len(rounds), padded)
        plan = Plan(
            np.full(shape, len(self.parts), np.int32),
            np.zeros((*shape, steps, batch_size), np.int32),
            np.zeros((*shape, batch_size), np.float32),
            np.zeros(shape, np.int32),
            np.full(shape, len(self.parts), np.int32),
        )
        for r, t in enumerate(rounds):
            plan.ids[r, :cohort] = self.cohort(t, cohort)
            for c, client in enumerate(plan.ids[r, :cohort]):
                size = min(len(self.parts[client]), batch_size)
                plan.samples[r, c, :, :size] = self.batches(t, client, steps, size)
                plan.samples[r, c, :, size:] = self.parts[client][0]  # the client's too: no other's travel
                plan.weight[r, c, :size] = 1
                plan.counts[r, c] = len(self.parts[client])
        plan.slots[:] = plan.ids
        return plan

    def cohort(self, t: int, size: int) -> np.ndarray:
        """The clients of round t, `[size]`, sorted; all clients where `size` is N."""
        rng = np.random.default_rng([self.seed, COHORT, t])
        return np.sort(rng.choice(len(self.parts), size, replace=False))

    def batches(self, t: int, client: int, steps: int, size: int) -> np.ndarray:
        """The samples of a client's local steps in round t, `[steps, size]`."""
        rng = np.random.default_rng([self.seed, BATCHES, t, client])
        part = self.parts[client]
        epochs = -(-steps * size // len(part))
        walk = np.concatenate([rng.permutation(part) for _ in range(epochs)])
        return walk[: steps * size].reshape(steps, size)
