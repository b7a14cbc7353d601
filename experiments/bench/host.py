"""How much of a run's rounds passes outside of their compiled program.

    python -m experiments.bench.host [--rounds=40] [--turns=5]

The digits run as `run.py` makes it, evaluated every ten rounds. In turns, the whole loop is timed,
evaluation, records and all, and the program alone on plans that are ready; the share is what the loop takes
more, the median over turns.
"""

import argparse
import statistics
import time

import jax

from fedgalore_jax import blocks, engine, train
from fedgalore_jax.config import Config
from fedgalore_jax.plans import plan
from fedgalore_jax.prepare import Prepared, prepare

BLOCK = 10


def alone(prepared: Prepared) -> float:
    """Seconds of all rounds, ten a call, with nothing in between."""
    config, machine, pieces = prepared.config, prepared.machine, prepared.blocks
    state, program = blocks.start(config, machine, prepared.loaded.params, pieces), prepared.compile()
    starts = range(0, config.rounds, BLOCK)
    rows = [
        plan(config, machine.chunk, prepared.federation, range(t, t + BLOCK), pieces.rounds) for t in starts
    ]
    data = jax.block_until_ready([blocks.load(machine, row, pieces) for row in rows])
    began = time.perf_counter()
    for args in data:
        state, _ = engine.run(program, state, *args, BLOCK)
    jax.block_until_ready(state)
    return time.perf_counter() - began


def looped(prepared: Prepared) -> float:
    """Seconds that a run's rounds took, as it records them."""
    result = train.execute(prepared, say=lambda line: None)
    return sum(record.get("seconds", 0) for record in result.history)


def main() -> None:
    """Prints a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40, help="a multiple of ten")
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    prepared = prepare(Config(rounds=args.rounds, eval_every=BLOCK))
    alone(prepared)
    turns = [(alone(prepared), looped(prepared)) for _ in range(args.turns)]
    shares = sorted(1 - program / loop for program, loop in turns)
    program, loop = (statistics.median(turn[i] for turn in turns) for i in (0, 1))
    print(f"program {program:.2f} s, loop {loop:.2f} s")
    print(f"outside: {statistics.median(shares):.1%} ({shares[0]:.1%} to {shares[-1]:.1%})")


if __name__ == "__main__":
    main()
