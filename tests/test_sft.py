"""Prompts and answers: what is learned, what generation starts from, and how answers are scored."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_llama
import tiny_tokenizer
from padding import widen

from fedgalore_jax import tasks
from fedgalore_jax.data import IGNORE, Source, packages, sft, tokens, word_problems
from fedgalore_jax.loading import with_classes
from fedgalore_jax.models import llama

BARE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
BARE += "{% if add_generation_prompt %}assistant: {% endif %}"
ROWS = [
    {"prompt": f"how many are {i} + 1", "answer": f"{i + 1} #### {i + 1}", "user": f"u{i % 2}"}
    for i in range(20)
]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "chat"])
def model(request, tmp_path_factory):
    return tiny_tokenizer.decoder(tmp_path_factory.mktemp("model"), chat=request.param)


def write(path, rows=ROWS):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_only_the_answer_is_learned_and_generation_starts_from_the_same_prompt(model, tmp_path):
    data = tasks.get("sft").load(Source(model, write(tmp_path / "a.jsonl"), client_column="user"))
    own, test = tokens.tokenizer(model), data.test
    assert [len(s.labels) for s in data[:3]] == [16, 2, 2] and data.num_labels == 0
    assert data.domain_names == ("u0", "u1") and not data.classes.any()
    for i, reference in enumerate(data.generation.references):
        learned = test.labels[i] != IGNORE
        np.testing.assert_array_equal(test.labels[i][learned], test.inputs["input_ids"][i][learned])
        answer = own.decode(test.labels[i][learned])
        end = "<|end|>" if own.chat_template else "<eos>"
        assert answer.strip() == reference + end
        prompt, mask = (data.generation.inputs[k][i] for k in ("input_ids", "attention_mask"))
        real = test.inputs["attention_mask"][i] > 0
        np.testing.assert_array_equal(prompt[mask > 0], test.inputs["input_ids"][i][real & ~learned])
        assert mask[-1] == 1 and (np.diff(mask) >= 0).all()  # padded on the left
    assert own.convert_tokens_to_ids(end) in data.generation.eos


def edit(folder, *without, file="tokenizer_config.json", **changes):
    path = folder / file
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({k: v for k, v in (content | changes).items() if k not in without}))


def learned(model, tmp_path):
    """What is learned as the answer "1", and the end tokens."""
    rows = [{"prompt": f"{i} ?", "answer": "1"} for i in range(3)]
    data = tasks.get("sft").load(Source(model, write(tmp_path / "one.jsonl", rows)))
    labels = data.train.labels[0]
    return tokens.tokenizer(model).decode(labels[labels != IGNORE]).strip(), data.generation.eos


@pytest.mark.parametrize(("end", "text"), [(0, "1<eos>"), (4, "1<|end|>"), ([4, 0], "1<|end|>")])
def test_a_model_may_name_its_end_where_its_tokenizer_does_not(end, text, tmp_path):
    model = tiny_tokenizer.decoder(tmp_path / "m")
    edit(model, "eos_token")
    edit(model, file="generation_config.json", eos_token_id=end)
    assert learned(model, tmp_path) == (text, tuple(np.ravel(end)))


def test_a_chat_template_ends_answers_with_any_added_token_or_they_get_an_end(tmp_path):
    model = tiny_tokenizer.decoder(tmp_path / "m", chat=True)
    edit(model, "additional_special_tokens")
    assert learned(model, tmp_path) == ("1<|end|>", (0, 4))
    edit(model, chat_template=BARE)
    assert learned(model, tmp_path) == ("1<eos>", (0,))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}", r"the chat template of .*/m fails \(Unexpected end of template"),
        ("{{ raise_exception('no') }}", r"the chat template of .*/m fails \(no\): correct it, or remove it"),
        ("{{ messages[5].content }}", "fails .*has no element 5"),
        ("{{ messages[0].content }}", "leaves the answer out"),
    ],
)
def test_chat_templates_that_cannot_be_used(template, message, tmp_path):
    model = tiny_tokenizer.decoder(tmp_path / "m")
    edit(model, chat_template=template)
    with pytest.raises(ValueError, match=message):
        learned(model, tmp_path)


@pytest.mark.parametrize("end", ["x", 330, -1])
def test_an_end_that_the_model_does_not_know_is_refused(end, tmp_path):
    model = tiny_tokenizer.decoder(tmp_path / "m", vocab_size=330)
    edit(model, file="generation_config.json", eos_token_id=end)
    with pytest.raises(ValueError, match=rf"the end token {end!r} of .*/m is not in \[0, 330\), the model's"):
        learned(model, tmp_path)


def test_padding_that_the_model_does_not_know_is_not_used(tmp_path):
    model = tiny_tokenizer.decoder(tmp_path / "m", vocab_size=320)
    edit(model, pad_token="<new>")
    assert tokens.tokenizer(model).pad_token_id == 320
    data = tasks.get("sft").load(Source(model, write(tmp_path / "a.jsonl")))
    ids = (data.train.inputs["input_ids"][:], data.generation.inputs["input_ids"])
    assert data.generation.pad == 0 and max(map(np.max, ids)) < 320


def test_a_perfect_answer_scores_and_text_after_the_end_does_not_count(model, tmp_path):
    data = tasks.get("sft").load(Source(model, write(tmp_path / "a.jsonl")))
    generation, own = data.generation, tokens.tokenizer(model)
    rows = [
        [*own(r, add_special_tokens=False)["input_ids"], generation.eos[-1]] for r in generation.references
    ]
    padded = np.full((len(rows), 64), own("9")["input_ids"][0])
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    assert generation.decode(padded) == generation.references
    assert generation.score(generation.decode(padded), generation.references) == {"exact_match": 1.0}


def test_loss_and_outputs_against_numpy_and_under_more_padding(model, tmp_path):
    task = tasks.get("sft")
    split = task.load(Source(model, write(tmp_path / "a.jsonl"))).train
    wide = widen(split, split.labels.shape[1] + 16, 1)
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(*wide.labels.shape, 330)).astype(np.float32)
    n = len(split.labels)
    weight = np.arange(n) % 2 * 1.0

    def batch(s):
        return {"labels": jnp.array(s.labels), "weight": jnp.array(weight, jnp.float32)}

    narrow = jnp.array(logits[:, : split.labels.shape[1]])
    outputs = np.asarray(task.outputs(narrow, batch(split)))
    np.testing.assert_allclose(outputs, task.outputs(jnp.array(logits), batch(wide)), rtol=1e-6)
    nll, count = 0.0, 0
    for i in range(n):
        for j in range(1, split.labels.shape[1]):
            if weight[i] and (label := split.labels[i, j]) != IGNORE:
                row = logits[i, j - 1].astype(np.float64)
                nll, count = nll + np.log(np.exp(row).sum()) - row[label], count + 1
    assert float(task.loss(narrow, batch(split))) == pytest.approx(nll / count, rel=1e-5)
    measured = task.metrics(outputs, split.labels)
    assert set(measured) == {"token_accuracy", "loss"} and measured["token_accuracy"] < 0.2


def test_long_samples_are_cut_or_dropped_and_counted(model, tmp_path):
    long = {"prompt": "how many " * 60, "answer": "7", "user": "u0"}
    half = {"prompt": "how many", "answer": "3 + 4 = 7 " * 60, "user": "u0"}
    for name in ("train", "validation", "test"):
        write(tmp_path / f"{name}.jsonl", [*ROWS, *([long, half] if name == "train" else [])])
    data = tasks.get("sft").load(Source(model, str(tmp_path), max_length=64, client_column="user"))
    assert len(data.train.labels) == len(data.domains) == 21
    assert data.train.labels.shape[1] == 64
    assert data.notes[0].startswith("2 of 22 train samples were longer than 64 tokens: 1 dropped")


def test_tokens_that_the_model_does_not_know(tmp_path):
    model = tiny_tokenizer.decoder(tmp_path / "m", vocab_size=262)
    with pytest.raises(ValueError, match=r"gives token \d+, and its config.json has vocab_size=262"):
        tasks.get("sft").load(Source(model, write(tmp_path / "a.jsonl")))


def test_bad_columns(model, tmp_path):
    source = Source(model, write(tmp_path / "a.jsonl"))
    with pytest.raises(ValueError, match="'answers' is missing in train: its columns are 'prompt', 'answer'"):
        tasks.get("sft").load(source._replace(text_column="prompt,answers"))
    with pytest.raises(ValueError, match="give two columns"):
        tasks.get("sft").load(source._replace(text_column="prompt"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("She has 3 + 4 = 7 apples.", "7"),
        ("3 + 4 = 7\n#### 1,234", "1234"),
        ("#### $18.00 of 20", "18.00"),
        ("The answer is: -5.", "-5"),
        ("about .5", ".5"),
        ("no number", None),
        ("", None),
    ],
)
def test_answers_are_extracted_as_the_harness_does(text, value):
    assert word_problems.number(text) == value


def test_metamath_to_gsm8k_from_files_of_their_schema(model, tmp_path):
    train = [
        {"query": f"{i} + 1 ?", "response": f"The answer is: {i + 1}", "type": f"GSM_{i % 3}"}
        for i in range(40)
    ]
    (tmp_path / "train.json").write_text(json.dumps(train))
    write(tmp_path / "test.jsonl", [{"question": "2 + 2 ?", "answer": "2 + 2 = 4\n#### 4"}] * 3)
    data = tasks.get("metamath").load(Source(model, str(tmp_path)))
    assert [len(s.labels) for s in data[:3]] == [36, 4, 3]
    assert data.label_names == ("GSM_0", "GSM_1", "GSM_2") and len(data.classes) == 36
    assert data.generation.score(["so 4.0", "The answer is: 4", "5"], data.generation.references)[
        "exact_match"
    ] == pytest.approx(2 / 3)


@pytest.mark.parametrize("original", [False, True])
def test_metamath_validates_on_problems_it_does_not_train_on(model, tmp_path, monkeypatch, original):
    """Forty problems in four rows each, two of them with the same query; one query is of two problems."""
    train, seen = [], {}
    for i in range(160):
        problem, query = i // 4, "what is x ?" if i in (0, 4) else f"{i // 4} + {i % 4 // 2} ?"
        train.append({"query": query, "response": f"The answer is: {i}", "type": "GSM_AnsAug"})
        train[-1] |= {"original_question": f"problem {problem}"} if original else {}
    train.append(train[-1] | {"query": " "})
    write(tmp_path / "train.jsonl", train)
    write(tmp_path / "test.jsonl", [{"question": "2 + 2 ?", "answer": "#### 4"}] * 3)

    def build(parts, *rest):
        seen.update(parts)
        return sft_build(parts, *rest)

    sft_build = sft.build
    monkeypatch.setattr(sft, "build", build)
    held_problems = set()
    for seed in range(12):
        data = tasks.get("metamath").load(Source(model, str(tmp_path), seed=seed))
        asked, learned = set(seen["validation"].prompts), set(seen["train"].prompts)
        assert asked and not asked & learned and "" not in asked | learned
        assert len(seen["validation"].prompts) in ((16,) if original else (14, 15, 16))
        held = {int(answer.split()[-1]) // 4 for answer in seen["validation"].answers}
        trained = {int(answer.split()[-1]) // 4 for answer in seen["train"].answers}
        assert not original or not held & trained
        held_problems |= held
        assert data.notes[0] == "1 of 161 training samples have an empty query and were left out"
    assert not original or held_problems & {0, 1}, "no seed held a problem with a shared query"


def test_gsm_symbolic_shares_no_problem_between_splits(tmp_path, monkeypatch):
    try:
        packages.find("reasoning-gym")
    except ImportError as error:
        pytest.skip(str(error))
    seen = {}

    def build(parts, *rest):
        seen.update(parts)
        return sft_build(parts, *rest)

    sft_build = sft.build
    monkeypatch.setattr(sft, "build", build)
    model = tiny_tokenizer.decoder(tmp_path / "m", max_position_embeddings=2048)
    data = tasks.get("gsm_symbolic").load(Source(model, max_length=1024))
    assert [len(s.labels) for s in data[:3]] == [2000, 200, 300]
    questions = [q for pairs in seen.values() for q in pairs.prompts]
    assert len(set(questions)) == 2500
    assert len(data.label_names) > 50 and len(data.classes) == 2000
    answers = seen["test"].answers
    assert data.generation.score(answers, data.generation.references) == {"exact_match": 1.0}
    assert np.mean([" = " in answer for answer in answers]) > 0.8
    fns = llama.build(tiny_llama.LLAMA)  # has no labels, whatever the kinds of problem are called
    assert with_classes(fns, data, drawn=False) is fns
