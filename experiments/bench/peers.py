"""Seconds a round against PyTorch, clients in turn: full fine-tuning, GaLore as `galore_torch`, `peft` LoRA.

    python -m experiments.bench.peers [--steps=2] [--repeats=3] [SHAPE ...]

Needs what tests/requirements.txt and tests/references.txt name. Either side has a process of its own, and
both take turns, a round each; the ratio is PyTorch's seconds over those of our method that trains the same
thing, the median over turns. Eight clients start from the same weights, take local steps of batch 16, and
are averaged. Our programs come from jax's cache, as in any run but the first: compiling takes more memory
than training.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from typing import Any

from experiments.bench.round import BATCH, CLIENTS, LABELS, LENGTH, RANK, SHAPES, SMALL, Server

PEERS = {"full AdamW": "fedavg", "galore_torch": "factored own", "peft LoRA": "fedit"}
"""PyTorch's variants, and ours that train the same."""


def network(shape: str) -> Any:
    """The model of `transformers` with a shape of `SHAPES`, freshly drawn."""
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = dict(SHAPES[shape], num_labels=LABELS)
    sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if "vocab_size" in sizes:
        return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**sizes))
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))


def samples(shape: str, steps: int, device: str) -> Any:
    """One client's batches `[steps, BATCH, ...]` and labels."""
    import torch

    sizes = SHAPES[shape]
    labels = torch.randint(LABELS, (steps, BATCH), device=device)
    if "vocab_size" in sizes:
        return torch.randint(5, sizes["vocab_size"], (steps, BATCH, LENGTH), device=device), labels
    side, channels = sizes["image_size"], sizes.get("num_channels", 3)
    return torch.randn(steps, BATCH, channels, side, side, device=device), labels


class GaLoreAdamW:
    """AdamW on the projections of some matrices, as `galore_torch` does it [V].

    The shorter side is projected, on singular vectors of the first gradient in 200 (a full SVD in float32).
    """

    def __init__(self, projected, plain, lr: float):
        self.projected, self.plain, self.lr, self.state = projected, plain, lr, {}

    def step(self) -> None:
        """One step on the gradients that parameters hold."""
        import torch

        for p in (*self.projected, *self.plain):
            state, g = self.state.setdefault(p, {"t": 0}), p.grad
            low, right = p in self.projected, p.shape[0] >= p.shape[-1]
            if low and state["t"] % 200 == 0:
                u, _, vt = torch.linalg.svd(g.float(), full_matrices=False)
                state["p"] = (vt[:RANK] if right else u[:, :RANK].T).contiguous()
            if low:
                g = g @ state["p"].T if right else state["p"] @ g
            if state["t"] == 0:
                state |= {"m": torch.zeros_like(g), "v": torch.zeros_like(g)}
            state["t"] += 1
            state["m"].mul_(0.9).add_(g, alpha=0.1)
            state["v"].mul_(0.999).addcmul_(g, g, value=0.001)
            update = state["m"] / state["v"].sqrt().add_(1e-6)
            if low:
                update = update @ state["p"] if right else state["p"].T @ update
            p.add_(update, alpha=-self.lr * (1 - 0.999 ** state["t"]) ** 0.5 / (1 - 0.9 ** state["t"]))


def trained(net: Any, variant: str) -> tuple[Any, Any]:
    """The network ready for a variant, and what makes a client's optimizer: `() -> optimizer`."""
    import torch

    if variant == "peft LoRA":
        import peft

        names = r".*layers?\.\d+\..*(query|key|value|dense|q_proj|k_proj|v_proj|o_proj|fc1|fc2)"
        config = peft.LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules=names, modules_to_save=["classifier"]
        )
        net = peft.get_peft_model(net, config)
    elif variant == "galore_torch":
        for name, p in net.named_parameters():
            p.requires_grad = "classifier" in name or (".layer" in name and p.ndim == 2)
    parameters = [p for p in net.parameters() if p.requires_grad]
    if variant != "galore_torch":
        return net, lambda: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0)
    head = {id(p) for name, p in net.named_parameters() if "classifier" in name}
    projected = [p for p in parameters if id(p) not in head]
    plain = [p for p in parameters if id(p) in head]
    return net, lambda: GaLoreAdamW(set(projected), plain, 1e-3)


def serve(shape: str, variant: str, steps: int, clients: int = CLIENTS) -> None:
    """A variant in this process: says it is ready, then runs a round of `clients` for every line it reads.

    Answers with seconds and the peak memory in MB: of the process, or on a GPU of PyTorch's own there.
    """
    import torch

    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    net, optimizer = trained(network(shape), variant)
    net = net.to(device).train()
    keys = [name for name, p in net.named_parameters() if p.requires_grad]
    start = {name: p.detach().clone() for name, p in net.named_parameters() if name in keys}
    data = [samples(shape, steps, device) for _ in range(clients)]

    def client(x, y):
        net.load_state_dict(start, strict=False)
        opt = optimizer()
        for k in range(steps):
            with torch.autocast(device, dtype=torch.bfloat16, enabled=cuda):
                logits = net(x[k]).logits
            loss = torch.nn.functional.cross_entropy(logits.float(), y[k])
            net.zero_grad(set_to_none=True)
            loss.backward()
            with torch.no_grad():
                opt.step()
        return {name: p.detach().clone() for name, p in net.named_parameters() if name in keys}

    def round_of(these):
        total = None
        for x, y in these:
            own = client(x, y)
            total = own if total is None else {name: total[name] + own[name] for name in keys}
        return {name: value / len(these) for name, value in (total or {}).items()}

    round_of(data[:1])
    print(json.dumps([0.0, 0.0]), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        start = round_of(data)
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        own = torch.cuda.max_memory_allocated() / 1e6 if cuda else 0
        print(
            json.dumps([seconds, own or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3]), flush=True
        )


def compare(shape: str, steps: int, repeats: int) -> None:
    """Prints a shape's table."""
    print(f"\n{shape}: {CLIENTS} clients x {steps} steps x batch {BATCH}, rank {RANK}")
    print(f"{'PyTorch':14}{'s/round':>9}{'MB':>7}   {'ours':14}{'s/round':>9}{'MB':>7}{'ratio':>7}")
    for peer, ours in PEERS.items():
        Server(shape, ours, steps).process.communicate()  # fills the cache
        pair = Server(shape, peer, steps, module="peers"), Server(shape, ours, steps)
        turns = [[server.round() for server in pair] for _ in range(repeats)]
        for server in pair:
            server.process.stdin.close()
        (theirs, their_mb), (own, own_mb) = (
            (statistics.median(t[i][0] for t in turns), turns[-1][i][1]) for i in (0, 1)
        )
        ratio = statistics.median(t[0][0] / t[1][0] for t in turns)
        print(f"{peer:14}{theirs:9.2f}{their_mb:7.0f}   {ours:14}{own:9.2f}{own_mb:7.0f}{ratio:7.2f}")


def main() -> None:
    """Prints one table per shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "shapes", nargs="*", help=f"of {', '.join(SHAPES)}; vit-tiny, roberta-tiny by default"
    )
    parser.add_argument("--steps", type=int, default=2, help="local steps")
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    args = parser.parse_args()
    if unknown := [*({*args.shapes} - {*SHAPES})]:
        parser.error(f"unknown {unknown[0]!r}: shapes {', '.join(SHAPES)}")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
        for shape in args.shapes or SMALL[1:]:
            compare(shape, args.steps, args.repeats)


if __name__ == "__main__":
    main()
