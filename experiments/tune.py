"""Finds learning rates on the validation split: one run per method, rate and seed.

python -m experiments.tune --method=fedgalore,fedavg,fedit --rates=1e-3,3e-3,1e-2 --seeds=0,1

Takes the flags of `run.py` besides, and sets --lr, --seed, --eval_every and --out_dir itself; the test split
is not looked at. The rates found for the default model stand in `fedgalore_jax/tasks.py`.
"""

import dataclasses
import statistics
import sys

from absl import flags

from experiments import flags as our_flags
from experiments.launch import guarded
from fedgalore_jax import train
from fedgalore_jax.config import Config


def main() -> None:
    """Prints a row per method and rate, the best of each method marked."""
    values = flags.FlagValues()
    our_flags.define(values)
    flags.DEFINE_list("rates", ["1e-3", "3e-3", "1e-2"], "learning rates to try", flag_values=values)
    flags.DEFINE_list("seeds", ["0", "1"], "seeds to average over", flag_values=values)
    if rest := values(sys.argv)[1:]:
        raise ValueError(f"unexpected argument {rest[0]!r}: flags look like --name=value")
    rates, seeds = _numbers(values, "rates", float), _numbers(values, "seeds", int)
    values.eval_every = values.rounds
    runs = [
        [[dataclasses.replace(c, lr=rate, seed=seed, out_dir=None) for seed in seeds] for rate in rates]
        for c in our_flags.configs(values)
    ]
    print(f"{'method':<12}{'lr':>8}{'validation':>12}{'lowest seed':>13}")
    for method in runs:
        means = {}
        for row in method:
            accuracies = [validated(config) for config in row]
            config = row[0]
            means[config.lr] = statistics.mean(accuracies)
            cells = f"{means[config.lr]:>12.4f}{min(accuracies):>13.4f}"
            print(f"{config.method:<12}{config.lr:>8.0e}{cells}", flush=True)
        best = max(means, key=lambda rate: means[rate])
        print(f"{config.method:<12}{best:>8.0e}  is best", flush=True)


def _numbers(values: flags.FlagValues, name: str, kind: type) -> list:
    try:
        return [kind(text) for text in values[name].value]
    except ValueError:
        raise ValueError(f"{name}={','.join(values[name].value)!r} must be numbers") from None


def validated(config: Config) -> float:
    """Final validation accuracy; 0 for a run that diverges."""
    try:
        return train.validate(config)
    except FloatingPointError:
        return 0.0


if __name__ == "__main__":
    guarded(main)
