"""How a round's seconds grow with clients, local steps and the population, and compile time with depth.

    python -m experiments.bench.growth [--repeats=5] [--out=growth.png]

FedGaLore on the shipped ViT's shape. Rounds of all sizes take turns, so that a busy machine slows them alike;
every curve is the median over turns. The exponent is the slope of a line through the logarithms: 1 is linear
growth, 0 is none. The population is who could be drawn; the cohort stays eight.
"""

import argparse
import pathlib
import time

import jax
import numpy as np

from experiments.bench.galore import medians
from experiments.bench.round import SHAPES, build
from experiments.report import save_curves
from fedgalore_jax import engine

SHAPE, VARIANT, STEPS = "digits-vit", "factored ajive", 5
CURVES = {
    "clients": (4, 8, 16, 32),
    "local steps": (5, 10, 20, 40),
    "population": (100, 1_000, 10_000, 100_000),
}
DEPTHS = (2, 4, 8, 16)


def program(axis: str, value: int):
    """A compiled round of one size, as a call."""
    sizes = {"clients": {"clients": value}, "local steps": {}, "population": {"population": value}}[axis]
    machine, state, plan = build(SHAPES[SHAPE], VARIANT, value if axis == "local steps" else STEPS, **sizes)
    args = (state, machine.train, plan, 1)
    compiled = engine.compiled(machine.program().lower(*args))
    return lambda: compiled(*args)


def rounds(axis: str, repeats: int) -> list[float]:
    """Seconds of a round at each size of one curve."""
    return list(medians({value: program(axis, value) for value in CURVES[axis]}, repeats).values())


def compiling(depth: int) -> float:
    """Seconds to lower and compile a round of so many scanned layers, with no cache."""
    sizes = SHAPES[SHAPE] | {"num_hidden_layers": depth}
    machine, state, plan = build(sizes, VARIANT, STEPS, scan_layers=True)
    began = time.perf_counter()
    engine.compiled(machine.program().lower(state, machine.train, plan, 1))
    return time.perf_counter() - began


def exponent(sizes, seconds) -> float:
    """The slope of a line through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def main() -> None:
    """Prints a table and draws it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--out", default="growth.png", help="picture")
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    curves = {axis: (sizes, rounds(axis, args.repeats)) for axis, sizes in CURVES.items()}
    curves["layers (compiling)"] = (DEPTHS, [compiling(depth) for depth in DEPTHS])
    for axis, (sizes, seconds) in curves.items():
        points = ", ".join(f"{size:,}: {s:.3f} s" for size, s in zip(sizes, seconds, strict=True))
        print(f"{axis:20} exponent {exponent(sizes, seconds):5.2f}   {points}", flush=True)
    titled = {f"{axis}\nexponent {exponent(*curve):.2f}": curve for axis, curve in curves.items()}
    save_curves(pathlib.Path(args.out), titled)


if __name__ == "__main__":
    main()
