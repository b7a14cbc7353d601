"""Tokens a second of generation with a cache, and of computing the prefix again for every token.

    python -m experiments.bench.generate [MODEL] [--batch 8] [--prompt 64] [--new 128]

Without a directory: random weights of a small Llama. A prefix is as long as it is half-way, on average,
and only its last logits are computed: recomputation in its best light, without its compilations.
"""

import argparse
import statistics
import time

import jax

from fedgalore_jax import models
from fedgalore_jax.models import llama

SMALL = llama.Config(
    model_type="llama",
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    max_position_embeddings=4096,
    rope=llama.Rope(),
    tie_word_embeddings=True,
)
REPEATS = 3


def seconds(call) -> float:
    """Median seconds of a call, after one to compile."""
    times = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def main() -> None:
    """Prints both rates and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a Hugging Face directory of a decoder")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64, help="tokens in each prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens to generate for each")
    args = parser.parse_args()
    if args.model:
        fns, params = models.load(args.model)
    else:
        fns = llama.build(SMALL)
        params = fns.init(jax.random.key(0))
    if fns.decoder is None:
        parser.error(f"{args.model} has no decoder: name a causal language model")

    def tokens(length):
        shape = args.batch, length
        return {"input_ids": jax.random.randint(jax.random.key(1), shape, 0, fns.config.vocab_size)}

    prompt, prefix = tokens(args.prompt), tokens(args.prompt + args.new // 2)
    again = jax.jit(lambda params, inputs: fns.decoder.prefill(params, inputs, 0)[0].argmax(-1))
    cached = seconds(lambda: models.generate(fns, params, prompt, max_new_tokens=args.new))
    recomputed = args.new * seconds(lambda: again(params, prefix))
    count = sum(x.size for x in jax.tree.leaves(params))
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {count / 1e6:.1f}M parameters")
    print(f"{args.batch} prompts of {args.prompt} tokens, {args.new} new tokens each, median of {REPEATS}")
    for name, time_ in (("cache", cached), ("prefix recomputed", recomputed)):
        print(f"{name:20}{args.batch * args.new / time_:10.1f} tokens/s")
    print(f"{'ratio':20}{recomputed / cached:10.1f}")


if __name__ == "__main__":
    main()
