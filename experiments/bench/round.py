"""Seconds a round and peak memory of the client paths.

python -m experiments.bench.round [--steps=10] [--repeats=5] [--chunk=C] [--variants=V,...] [SHAPE ...]

Every variant has a process of its own (peak memory is a process's), and the processes take turns, a round
each: the ratio column is the median over turns of this variant's seconds over dense's in the same turn. On
a shared machine absolute times say little. The encoder of the RoBERTa-tiny shape is fed patches in place of
tokens: its products are what is measured.
"""

import argparse
import functools
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

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
    "roberta-base": dict(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
        vocab_size=50265, max_position_embeddings=514, type_vocab_size=1,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    ),
    "vit-b16": dict(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
        image_size=224, patch_size=16,
    ),
}  # fmt: skip
"""Sizes by Hugging Face's names; what has a vocabulary reads `LENGTH` tokens, none of them padding."""
SMALL = ("digits-vit", "vit-tiny", "roberta-tiny")
VARIANTS = {
    "factored": ("fedgalore", {"sync": "mean"}),
    "factored own": ("fedgalore", {"sync": "mean", "basis": "own"}),
    "factored ajive": ("fedgalore", {"sync": "ajive"}),
    "dense": ("fedgalore", {"sync": "mean", "client_weights": "dense"}),
    "fedit": ("fedit", {}),
    "fedavg": ("fedavg", {}),
}
CLIENTS, BATCH, RANK, LENGTH, LABELS = 8, 16, 8, 128, 10


def classifier(fns, train, clients: int, steps: int, chunk: int, method: str, **options):
    """An engine that trains a classifier by a method."""
    from fedgalore_jax import engine, strategies, tasks

    return engine.Engine(
        strategies.build(method, lr=1e-3, **options),
        lambda params, batch, key: tasks.cross_entropy(fns.apply(params, batch, key=key), batch),
        engine.on_device(train),
        clients,
        steps,
        chunk,
    )


def build(
    sizes: dict[str, Any],
    variant: str,
    steps: int,
    *,
    clients: int = CLIENTS,
    population: int | None = None,
    chunk: int | None = None,
    precision: str = "float32",
    scan_layers: bool | None = None,
):
    """An engine over random weights and data, the state before the first round, and that round's plan.

    Args:
      sizes: one of `SHAPES`.
      variant: one of `VARIANTS`.
      steps: K.
      clients: C.
      population: N, if others than the cohort are there; they share its samples.
      chunk: clients trained at a time; None as in a run.
      precision, scan_layers: of the model.
    """
    import jax
    import numpy as np

    from fedgalore_jax import blocks, engine
    from fedgalore_jax.data import FederatedData, Split
    from fedgalore_jax.models import roberta, vit

    rng, samples, everyone = np.random.default_rng(0), clients * BATCH, population or clients
    labels = tuple(map(str, range(LABELS)))
    if "vocab_size" in sizes:
        config = roberta.Config(**sizes, labels=labels)
        fns = roberta.build(config, precision=precision, scan_layers=scan_layers)
        inputs = {"input_ids": rng.integers(5, config.vocab_size, (samples, LENGTH)).astype(np.int32)}
    else:
        config = vit.Config(**sizes, labels=labels)
        fns = vit.build(config, precision=precision, scan_layers=scan_layers)
        pixels = (samples, config.image_size, config.image_size, config.num_channels)
        inputs = {"pixel_values": rng.normal(size=pixels).astype(np.float32)}
    train = Split(inputs, rng.integers(0, LABELS, samples))
    method, options = VARIANTS[variant]
    machine = classifier(fns, train, everyone, steps, clients, method, rank=RANK, **options)
    params = jax.jit(fns.init)(jax.random.key(0))
    each = functools.partial(blocks.activations, machine.loss, params, machine.train, BATCH)
    machine = machine._replace(chunk=chunk or blocks.at_a_time(clients, each))
    state = engine.init(machine.strategy, params, jax.random.key(1), everyone)
    parts = [np.arange(BATCH) + BATCH * (i % clients) for i in range(everyone)]
    return machine, state, FederatedData(parts, 0).plan(range(1), clients, steps, BATCH)


def serve(shape: str, variant: str, steps: int, chunk: int | None = None) -> None:
    """One variant in this process: says what compiling took, then runs a round for every line it reads."""
    import jax

    from fedgalore_jax import engine

    machine, state, plan = build(SHAPES[shape], variant, steps, chunk=chunk)
    began = time.perf_counter()
    rounds = engine.compiled(machine.program().lower(state, machine.train, plan, 1))
    compiled = time.perf_counter() - began
    jax.block_until_ready(rounds(state, machine.train, plan, 1))
    print(json.dumps([compiled, rounds.memory_analysis().temp_size_in_bytes / 1e6]), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        state, _ = jax.block_until_ready(engine.run(rounds, state, machine.train, plan, 1))
        seconds = time.perf_counter() - began
        print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3]), flush=True)


class Server:
    """A process that runs rounds of one variant on demand, by the `serve` of this module or of another."""

    def __init__(self, *args: str | int | None, module: str = "round"):
        code = f"from experiments.bench.{module} import serve; serve(*{args!r})"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process: Any = subprocess.Popen([sys.executable, "-c", code], **pipes)
        self.compiled, self.temporary = self.answer()

    def round(self) -> tuple[float, float]:
        """Seconds of one round, and the process's peak memory so far in MB."""
        print("go", file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self) -> tuple[float, float]:
        """The next line of the process; its own traceback stands on stderr if there is none."""
        line = self.process.stdout.readline()
        return tuple(json.loads(line)) if line else sys.exit(1)


def main() -> None:
    """Prints one table per shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="*", help=f"of {', '.join(SHAPES)}; {', '.join(SMALL)} by default")
    parser.add_argument("--steps", type=int, default=10, help="local steps")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--chunk", type=int, help="clients trained at a time; as a run has it by default")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated")
    args = parser.parse_args()
    variants = args.variants.split(",")
    if unknown := [*({*args.shapes} - {*SHAPES}), *({*variants} - {*VARIANTS})]:
        parser.error(f"unknown {unknown[0]!r}: shapes {', '.join(SHAPES)}; variants {', '.join(VARIANTS)}")
    for shape in args.shapes or SMALL:
        print(f"\n{shape}: {CLIENTS} clients x {args.steps} steps x batch {BATCH}, rank {RANK}")
        print(
            f"{'':16}{'s/round':>9}{'vs dense':>10}{'range':>16}{'peak MB':>9}{'temp MB':>9}{'compile s':>11}"
        )
        servers = {variant: Server(shape, variant, args.steps, args.chunk) for variant in variants}
        turns = [{v: server.round() for v, server in servers.items()} for _ in range(args.repeats)]
        for variant, server in servers.items():
            server.process.stdin.close()
            seconds = statistics.median(turn[variant][0] for turn in turns)
            ratios = [turn[variant][0] / turn.get("dense", turn[variant])[0] for turn in turns]
            print(
                f"{variant:16}{seconds:9.2f}{statistics.median(ratios):10.2f}"
                f"{min(ratios):8.2f} to {max(ratios):.2f}{turns[-1][variant][1]:9.0f}"
                f"{server.temporary:9.0f}{server.compiled:11.1f}"
            )


if __name__ == "__main__":
    main()
