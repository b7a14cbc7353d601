"""Finds learning rates on the validation split, and writes them down as a preset.

python -m experiments.tune --method=fedgalore,fedavg,fedit --preset=experiments/configs/mine.cfg
python run.py --flagfile=experiments/configs/mine.cfg

Takes the flags of `run.py` besides, and sets --lr, --seed, --eval_every and --out_dir itself; the test split
is not looked at. All rates and seeds of a method are one compiled program. Where the best rate is at an end
of the grid, the grid goes on beyond it, until a rate further out is no better. The rates found for the
default model stand in `fedgalore_jax/tasks.py`.
"""

import dataclasses
import math
import pathlib
import shlex
import statistics
import sys
from collections.abc import Iterator

from absl import flags

from experiments import flags as our_flags
from experiments.launch import guarded
from fedgalore_jax import train
from fedgalore_jax.trials import Trials, trials

_OWN = ("rates", "seeds", "search_rounds", "preset")
_SET = ("lr", "seed", "eval_every", "out_dir")


def main() -> None:
    """Prints a row per method and rate, the best of each method marked, and writes the preset."""
    values = flags.FlagValues()
    our_flags.define(values)
    flags.DEFINE_list("rates", ["1e-3", "3e-3", "1e-2"], "learning rates to begin with", flag_values=values)
    flags.DEFINE_list("seeds", ["0", "1"], "seeds to average over", flag_values=values)
    flags.DEFINE_integer("search_rounds", None, "rounds of a trial, --rounds if None", flag_values=values)
    flags.DEFINE_string("preset", None, "a flagfile to write the best rates into", flag_values=values)
    if rest := values(sys.argv)[1:]:
        raise ValueError(f"unexpected argument {rest[0]!r}: flags look like --name=value")
    rates, seeds = sorted(set(_numbers(values, "rates", float))), _numbers(values, "seeds", int)
    if len(rates) < 2 or not all(0 < rate < math.inf for rate in rates):
        raise ValueError(
            f"rates={','.join(values.rates)!r} are no grid: give two or more, positive and finite"
        )
    if not seeds:
        raise ValueError("seeds='' are none: give one or more")
    if given := [name for name in _SET if values[name].present]:
        raise ValueError(f"{given[0]} is set by the search: leave it out")
    configs = our_flags.configs(values)
    if given := [config.method for config in configs if "lr" in config.opt]:
        raise ValueError(f"opt lr of {given[0]}: the search sets it, give --rates")
    preset = pathlib.Path(values.preset) if values.preset else None
    if preset and (preset.exists() or not preset.parent.is_dir()):
        raise ValueError(f"preset={values.preset!r} is not usable: name a new file in a folder that exists")
    rounds = values.rounds if values.search_rounds is None else values.search_rounds
    ready: list[Trials] = []  # all of them are sound before the first begins
    for config in configs:
        config = dataclasses.replace(config, rounds=rounds, eval_every=rounds)
        for seed in seeds:
            dataclasses.replace(config, seed=seed)
        ready.append(trials(config, beside=ready[0].shared if ready else None))
    head = f"{'method':<12}{'lr':>8}{'validation':>12}{'lowest seed':>13}"
    table, found = [head], {}
    print(head, flush=True)
    for config, trial in zip(configs, ready, strict=True):
        scores: dict[float, float] = {}
        for lr, beyond in search(rates, scores):
            accuracies = [validated(trial, lr, seed) for seed in seeds]
            scores[lr] = statistics.mean(accuracies)
            cells = f"{scores[lr]:>12.4f}{min(accuracies):>13.4f}{beyond * '  beyond the grid'}"
            table.append(f"{config.method:<12}{lr:>8.2g}{cells}")
            print(table[-1], flush=True)
        found[config.method] = best(scores)
        if scores[best(scores)] == -math.inf:
            raise FloatingPointError(
                f"{config.method} diverges at all of {sorted(scores)}: give lower --rates"
            )
        table.append(f"{config.method:<12}{best(scores):>8.2g}  is best")
        print(table[-1], flush=True)
        if preset:  # whole after each method
            preset.write_text(flagfile(values, preset, table, found), encoding="utf-8")


def _numbers(values: flags.FlagValues, name: str, kind: type) -> list:
    try:
        return [kind(text) for text in values[name].value]
    except ValueError:
        raise ValueError(f"{name}={','.join(values[name].value)!r} must be numbers") from None


def search(rates: list[float], scores: dict[float, float]) -> Iterator[tuple[float, bool]]:
    """The rates to try, and whether each is beyond the grid; `scores` is filled in between.

    Args:
      rates: two or more, ascending.
      scores: of the rates tried so far, larger is better.
    """
    yield from ((rate, False) for rate in rates)
    while True:
        tried = sorted(scores)
        if best(scores) == tried[0]:
            yield further(tried[0], tried[1]), True
        elif best(scores) == tried[-1]:
            yield further(tried[-1], tried[-2]), True
        else:
            return


def further(edge: float, inside: float) -> float:
    """The next rate beyond an end of the grid, at the same ratio, with one digit where that is beyond it.

    >>> further(1e-2, 3e-3), further(1e-3, 3e-3)
    (0.03, 0.0003)
    """
    exact = edge * edge / inside
    short = float(f"{exact:.0e}")
    return short if (short - edge) * (exact - edge) > 0 else exact


def best(scores: dict[float, float]) -> float:
    """The rate that scored best, of equals the one tried first."""
    return max(scores, key=lambda rate: scores[rate])


def validated(trial: Trials, lr: float, seed: int) -> float:
    """Final validation metric; minus infinity for a run that diverges."""
    prepared = trial(lr, seed)
    try:
        return train.validate(prepared)[prepared.task.metric]
    except FloatingPointError:
        return -math.inf


def flagfile(
    values: flags.FlagValues, preset: pathlib.Path, table: list[str], found: dict[str, float]
) -> str:
    """The preset: the table as comments, then every flag that was given and a rate per method."""
    command = shlex.join(["python", "-m", "experiments.tune", *sys.argv[1:]])
    given = [
        values[name].serialize()
        for name in values
        if values[name].present and name not in (*_OWN, *_SET, "method")
    ]
    rates = [f"--opt={method}.lr={rate:g}" for method, rate in found.items()]
    metric = (
        "# Learning rates by the mean over seeds of the last validation metric; the test split was not seen."
    )
    comments = [
        f"# {command}",
        f"# python run.py --flagfile={preset}",
        metric,
        *(f"# {row}" for row in table),
    ]
    return "\n".join([*comments, f"--method={','.join(found)}", *given, *rates]) + "\n"


if __name__ == "__main__":
    guarded(main)
