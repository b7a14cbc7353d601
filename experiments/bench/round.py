"""Seconds a round and peak memory of the client paths.

python -m experiments.bench.round [--steps=10] [--variants=factored,dense] [SHAPE ...]

Every variant runs in a process of its own (peak memory is a process's), variants take turns, and the ratio
columns compare medians of one run; on a shared machine absolute times say little. The encoder of the
RoBERTa-tiny shape is fed patches in place of tokens: its products are what is measured.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

SHAPES = {
    "digits-vit": dict(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256,
        image_size=8, patch_size=2, num_channels=1, hidden_act="gelu_pytorch_tanh",
    ),
    "vit-tiny": dict(
        hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768,
        image_size=32, patch_size=4,
    ),
    "roberta-tiny": dict(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512,
        image_size=44, patch_size=4,
    ),
}  # fmt: skip
VARIANTS = {
    "factored": ("fedgalore", {"sync": "mean"}),
    "factored own": ("fedgalore", {"sync": "mean", "basis": "own"}),
    "factored ajive": ("fedgalore", {"sync": "ajive"}),
    "dense": ("fedgalore", {"sync": "mean", "client_weights": "dense"}),
    "fedit": ("fedit", {}),
}
CLIENTS, BATCH, RANK, REPEATS = 8, 16, 8, 2


def measure(shape: str, variant: str, steps: int) -> dict[str, float]:
    """One variant in this process: median seconds, peak and temporary memory."""
    import jax
    import numpy as np

    from fedgalore_jax import engine, strategies, tasks
    from fedgalore_jax.data import FederatedData, Split
    from fedgalore_jax.models import vit

    config = vit.Config(**SHAPES[shape], labels=tuple(map(str, range(10))))
    fns = vit.build(config)
    rng = np.random.default_rng(0)
    side, channels = config.image_size, config.num_channels
    pixels = rng.normal(size=(CLIENTS * BATCH, side, side, channels)).astype(np.float32)
    train = Split({"pixel_values": pixels}, rng.integers(0, 10, len(pixels)))
    method, options = VARIANTS[variant]
    machine = engine.Engine(
        strategies.build(method, lr=1e-3, rank=RANK, **options),
        lambda params, batch, key: tasks.cross_entropy(fns.apply(params, batch, key=key), batch),
        fns.apply,
        engine.on_device(train),
        CLIENTS,
        steps,
        CLIENTS,
    )
    state = engine.init(machine.strategy, fns.init(jax.random.key(0)), jax.random.key(1), CLIENTS)
    parts = np.split(np.arange(len(pixels)), CLIENTS)
    plan = FederatedData(parts, 0).plan(range(1), CLIENTS, steps, BATCH)
    began = time.perf_counter()
    rounds = machine.programs()[0].lower(state, machine.train, plan, 1).compile()
    compiled = time.perf_counter() - began
    times = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        state, _ = jax.block_until_ready(rounds(state, machine.train, plan, 1))
        times.append(time.perf_counter() - began)
    return {
        "seconds": statistics.median(times[1:]),
        "compile": compiled,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "temp": rounds.memory_analysis().temp_size_in_bytes / 1e6,
    }


def main() -> None:
    """Prints one table per shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="*", help=f"of {', '.join(SHAPES)}; all by default")
    parser.add_argument("--steps", type=int, default=10, help="local steps")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated")
    args = parser.parse_args()
    variants = args.variants.split(",")
    if unknown := [*({*args.shapes} - {*SHAPES}), *({*variants} - {*VARIANTS})]:
        parser.error(f"unknown {unknown[0]!r}: shapes {', '.join(SHAPES)}; variants {', '.join(VARIANTS)}")
    for shape in args.shapes or SHAPES:
        print(f"\n{shape}: {CLIENTS} clients x {args.steps} steps x batch {BATCH}, rank {RANK}")
        print(f"{'':16}{'s/round':>9}{'vs dense':>10}{'peak MB':>9}{'temp MB':>9}{'compile s':>11}")
        rows = {}
        for variant in variants:
            code = (
                "import json, sys; from experiments.bench.round import measure;"
                f"print(json.dumps(measure({shape!r}, {variant!r}, {args.steps})))"
            )
            out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
            if out.returncode:
                sys.exit(out.stderr)
            rows[variant] = json.loads(out.stdout.splitlines()[-1])
        for variant, row in rows.items():
            ratio = row["seconds"] / rows.get("dense", row)["seconds"]
            print(
                f"{variant:16}{row['seconds']:9.2f}{ratio:10.2f}{row['peak']:9.0f}"
                f"{row['temp']:9.0f}{row['compile']:11.1f}"
            )


if __name__ == "__main__":
    main()
