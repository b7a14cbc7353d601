"""What a round costs where there are many clients, and what a large model takes on many devices.

python -m experiments.bench.scale [cohort] [clients] [llama]

`cohort`: seconds of the fastest of five rounds, and device memory, for cohorts of 8 to 1024, of which eight
clients are trained at a time.
`clients`: the same for 100 to 100,000 clients that remember something (SCAFFOLD), 32 of them in a round. The
host keeps their memories, and their samples come from one small set, which is dealt over and over again.
`llama`: bytes of arguments and temporaries on each of 256 devices for a 7B Llama, from the compiled round of
abstract arrays: nothing of that size is allocated. It is compiled for CPU devices, so it is an estimate.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence

from experiments.bench.round import classifier

PARTS = ("cohort", "clients", "llama")
COHORTS = (8, 16, 32, 64, 128, 256, 512, 1024)
CLIENTS = (100, 1_000, 10_000, 100_000)
STEPS, BATCH, RANK, CHUNK = 4, 8, 4, 8
SHAPE = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
    image_size=8, patch_size=4, num_channels=1,
)  # fmt: skip
LLAMA = dict(
    model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=32, head_dim=128, max_position_embeddings=4096,
)  # fmt: skip
MESH, LENGTH = (32, 8), 512


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
    program = engine.compiled(made.rounds().lower(there, made.train, plans[0], 1))
    seconds = []
    for plan in plans:
        began = time.perf_counter()
        state, metrics = blocks.advance(program, made, state, plan, 1, cut)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - began)
    used, kept = program.memory_analysis(), tree.nbytes(state.clients) if on_host else 0
    device = used.argument_size_in_bytes + used.temp_size_in_bytes
    return f"{cohort:8}{clients:10}{min(seconds[1:]):12.4f}{human(device):>12}{human(kept):>12}"


def llama() -> str:
    """The bytes of a 7B model's round on each device of a mesh."""
    import jax
    import jax.numpy as jnp

    from fedgalore_jax import engine, placement, strategies, tasks
    from fedgalore_jax.data import FederatedData
    from fedgalore_jax.models import llama as family
    from fedgalore_jax.progress import human

    clients, model = MESH
    mesh = placement.mesh(f"{clients}x{model}")
    assert mesh is not None
    fns = family.build(
        family.Config(**LLAMA, rope=family.Rope()), precision="bf16", scan_layers=True, remat=True
    )
    strategy = strategies.build(
        "fedgalore", lr=1e-3, rank=8, roles=(("layers/.*kernel", "adapt"), (".*", "freeze"))
    )
    shape, whole = (clients * BATCH, LENGTH), placement.whole(mesh)
    train = {
        name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=whole)
        for name in ("input_ids", "attention_mask", "labels")
    }

    def loss(params, batch, key):
        return tasks.get("sft").loss(fns.apply(params, batch, key=key), batch)

    made = engine.Engine(strategy, loss, train, clients, STEPS, clients, mesh)
    key = jax.random.key(0)
    params = jax.eval_shape(fns.init, key)
    state = jax.eval_shape(lambda params: engine.init(strategy, params, key, clients, mesh), params)
    state = placement.placed(state, engine.shardings(strategy, state, mesh))
    parts = [range(c * BATCH, (c + 1) * BATCH) for c in range(clients)]
    plan = FederatedData(list(map(jnp.asarray, parts)), 0).plan(range(1), clients, STEPS, 1, clients)
    began = time.perf_counter()
    used = engine.compiled(made.rounds().lower(state, train, plan, 1)).memory_analysis()
    count = sum(x.size for x in jax.tree.leaves(params))
    return (
        f"{count / 1e9:.2f}B parameters in float32, mesh {clients}x{model}, {clients} clients, batch 1 x"
        f" {LENGTH} tokens, rank 8. A device: arguments {human(used.argument_size_in_bytes)}, temporaries"
        f" {human(used.temp_size_in_bytes)}. An estimate: compiled for CPU devices, in"
        f" {time.perf_counter() - began:.0f} s"
    )


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
        if part == "llama":
            settings = {"JAX_PLATFORMS": "cpu"}
            settings["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={MESH[0] * MESH[1]}"
            code = "from experiments.bench.scale import llama; print(llama())"
            subprocess.run([sys.executable, "-c", code], env=os.environ | settings, check=True)
            continue
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
