"""What a round costs where there are many clients.

python -m experiments.bench.scale [cohort] [clients]

`cohort`: seconds of the fastest of five rounds, and device memory, for cohorts of 8 to 1024, of which eight
clients are trained at a time.
`clients`: the same for 100 to 100,000 clients that remember something (SCAFFOLD), 32 of them in a round. The
host keeps their memories, and their samples come from one small set, which is dealt over and over again.
"""

import argparse
import time
from collections.abc import Sequence

from experiments.bench.round import classifier

PARTS = ("cohort", "clients")
COHORTS = (8, 16, 32, 64, 128, 256, 512, 1024)
CLIENTS = (100, 1_000, 10_000, 100_000)
STEPS, BATCH, RANK, CHUNK = 4, 8, 4, 8
SHAPE = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
    image_size=8, patch_size=4, num_channels=1,
)  # fmt: skip


def machine(method: str, clients: int, **options):
    """An engine on a small ViT, its parameters, and a federation whose clients share 1000 samples."""
    import jax
    import numpy as np

    from fedgalore_jax.data import FederatedData, Split
    from fedgalore_jax.models import vit

    fns = vit.build(vit.Config(**SHAPE, labels=tuple("0123456789")), scan_layers=True)
    rng = np.random.default_rng(0)
    train = Split(
        {"pixel_values": rng.normal(size=(1000, 8, 8, 1)).astype(np.float32)}, rng.integers(0, 10, 1000)
    )
    made = classifier(fns, train, clients, STEPS, CHUNK, method, rank=RANK, **options)
    federation = FederatedData([(np.arange(BATCH) + 7 * c) % 1000 for c in range(clients)], 0)
    return made, fns.init(jax.random.key(0)), federation


def measure(method: str, clients: int, cohort: int, *, on_host: bool, rounds: int = 5, **options) -> str:
    """One line: the fastest round, the program's device memory, and what the host keeps of the clients."""
    import jax

    from fedgalore_jax import blocks, engine, tree
    from fedgalore_jax.progress import human

    made, params, federation = machine(method, clients, **options)
    cut = blocks.Blocks(1, cohort if on_host else None, 0)
    state = engine.init(made.strategy, params, jax.random.key(1), clients, remember=not on_host)
    if on_host:
        state = state._replace(clients=blocks.on_host(made, params, clients))
    plans = [federation.plan(range(t, t + 1), cohort, STEPS, BATCH, CHUNK) for t in range(rounds + 1)]
    there = state._replace(clients=cut.on_devices(state.clients))
    program = engine.compiled(made.program().lower(there, made.train, plans[0], 1))
    seconds = []
    for plan in plans:
        began = time.perf_counter()
        state, metrics = blocks.advance(program, made, state, plan, 1, cut)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - began)
    used, kept = program.memory_analysis(), tree.nbytes(state.clients) if on_host else 0
    device = used.argument_size_in_bytes + used.temp_size_in_bytes
    return f"{cohort:8}{clients:10}{min(seconds[1:]):12.4f}{human(device):>12}{human(kept):>12}"


def main(argv: Sequence[str] | None = None) -> None:
    """Prints what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--largest", type=int, default=CLIENTS[-1], help="cohorts and clients up to this")
    args = parser.parse_args(argv)
    if unknown := {*args.parts} - {*PARTS}:
        parser.error(f"unknown {min(unknown)!r}: give some of {', '.join(PARTS)}")
    head = f"{'cohort':>8}{'clients':>10}{'s/round':>12}{'device':>12}{'host keeps':>12}"
    for part in args.parts or PARTS:
        print(f"\n{part}: {STEPS} steps x batch {BATCH}, {CHUNK} clients at a time\n{head}", flush=True)
        for size in COHORTS if part == "cohort" else CLIENTS:
            if size > args.largest:
                break
            if part == "cohort":
                print(measure("fedgalore", size, size, on_host=False, sync="mean"), flush=True)
            else:
                print(measure("scaffold", size, 32, on_host=True), flush=True)


if __name__ == "__main__":
    main()
