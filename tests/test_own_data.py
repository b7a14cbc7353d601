"""From a user's files, or small ones of a hub's schema, to a model that answers: whole runs, tiny models."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny_llama
import tiny_tokenizer
import tiny_vit
from test_launch import launch, lines

from fedgalore_jax import models, saved, train
from fedgalore_jax.config import Config
from fedgalore_jax.data import digits, tables, text
from fedgalore_jax.models import llama, vit

SHORT = ["--rounds=2", "--local_steps=2", "--batch_size=4", "--rank=2", "--lr=1e-2", "--clients=3"]


def save(folder, config, family):
    fns = family.build(config, scan_layers=True)
    models.save(folder, fns, fns.init(jax.random.key(0)))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "bert"
    save(
        folder, dataclasses.replace(tiny_vit.BERT, vocab_size=120, max_position_embeddings=32), tiny_vit.bert
    )
    content = (folder / "config.json").read_text()
    tiny_tokenizer.encoder(folder)
    (folder / "config.json").write_text(content)
    return folder


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llama"
    save(folder, dataclasses.replace(tiny_llama.TIED, vocab_size=320, bos_token_id=None), llama)
    content = (folder / "config.json").read_text()
    tiny_tokenizer.decoder(folder, chat=True)
    (folder / "config.json").write_text(content)
    return folder


def table(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def summary(out):
    return json.loads((out / "summary.json").read_text())


def test_a_table_with_clients_of_its_own(encoder, tmp_path, capsys):
    """Three clients by name; the saved model then evaluates and answers with its own tokenizer."""
    rows = [
        {"text": "good film" if i % 2 else "bad story", "label": ("bad", "good")[i % 2], "user": f"u{i % 3}"}
        for i in range(60)
    ]
    data, out = table(tmp_path / "own.jsonl", rows), tmp_path / "out"
    own = ["--task=text", f"--data={data}", "--client_column=user"]
    launch(*own, *SHORT, f"--model={encoder}", "--partition=domain", "--keep=best", f"--out_dir={out}")
    said = capsys.readouterr().out
    assert "u0" in said and set(summary(out)["final"]) == {"accuracy", "loss"}

    launch(*own, f"--evaluate={out / 'model'}")
    again = json.loads(capsys.readouterr().out)
    assert again["accuracy"] == pytest.approx(summary(out)["final"]["accuracy"])

    asked = table(tmp_path / "asked.jsonl", [{"text": "good film"}, {"text": "bad story"}])
    launch("--task=text", f"--model={out / 'model'}", f"--predict={asked}")
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [a["sample"] for a in answers] == [1, 2]
    assert all(a["label"] in ("bad", "good") and 0.5 <= a["score"] <= 1 for a in answers)

    launch("--task=text", f"--model={out / 'model'}", f"--predict={asked}", "--max_length=3")
    assert capsys.readouterr().err == (
        f"2 of 2 texts of {asked} were cut to 3 tokens: raise --max_length to read more\n"
    )
    launch(*own, f"--evaluate={out / 'model'}", "--max_length=3")
    assert "6 of 6 texts of test were cut to 3 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mnli", "stsb"])
def test_glue_from_files_of_its_schema(encoder, tmp_path, name):
    """Pairs of sentences; mnli has two tests, stsb is a regression."""
    columns = ("premise", "hypothesis") if name == "mnli" else ("sentence1", "sentence2")
    tests = ("validation_matched", "validation_mismatched") if name == "mnli" else ("validation",)
    for split, size in {"train": 40, **dict.fromkeys(tests, 10)}.items():
        rows = [
            {
                columns[0]: LINES[i % 3],
                columns[1]: LINES[i % 2],
                "label": i % 3 if name == "mnli" else (i % 5) / 1.0,
            }
            for i in range(size)
        ]
        table(tmp_path / f"{split}.jsonl", rows)
    launch(
        f"--task=glue/{name}", f"--data={tmp_path}", f"--model={encoder}", *SHORT, f"--out_dir={tmp_path}/out"
    )
    final = summary(tmp_path / "out")["final"]
    assert {"accuracy", "mismatched/accuracy"} <= set(final) if name == "mnli" else "spearman" in final


def test_a_classifier_has_no_value_to_predict(encoder, tmp_path):
    asked = table(tmp_path / "asked.jsonl", [{"text": "good film"}])
    config = Config(task="glue/stsb", model=str(encoder), text_column="text")
    with pytest.raises(ValueError, match="has a head for 5 labels, glue/stsb has 1"):
        next(saved.predict(config, str(asked)))


LINES = tiny_tokenizer.LINES


def test_prompts_and_answers(decoder, tmp_path, capsys):
    """The loss is on answers alone, the test is generated, and the trained model answers a file."""
    rows = [{"prompt": f"how many ? {i % 3}", "answer": i % 3} for i in range(40)]
    data, out = table(tmp_path / "own.jsonl", rows), tmp_path / "out"
    launch(
        "--task=sft", f"--data={data}", f"--model={decoder}", *SHORT, "--partition=iid", f"--out_dir={out}"
    )
    assert {"exact_match", "token_accuracy", "loss"} <= set(summary(out)["final"])
    records = lines(out / "metrics.jsonl")
    assert records[-1]["loss"] < records[0]["loss"]
    capsys.readouterr()
    asked = table(tmp_path / "asked.jsonl", [{"prompt": "how many ? 1" * 20}])
    launch("--task=sft", f"--model={out / 'model'}", f"--predict={asked}")
    said = capsys.readouterr()
    assert said.err == "1 of 1 prompts lost their beginning: 64 tokens fit\n"
    (answer,) = (json.loads(line) for line in said.out.splitlines())
    assert answer["sample"] == 1 and isinstance(answer["answer"], str)


def test_images_in_domains_as_domainnet_has_them(tmp_path, capsys):
    from PIL import Image

    save(tmp_path / "vit", dataclasses.replace(tiny_vit.CONFIG, labels=("a", "b")), vit)
    rng = np.random.default_rng(0)
    for domain in ("clipart", "real", "sketch"):
        for label, shade in {"cat": 40, "dog": 200}.items():
            folder = tmp_path / "data" / domain / label
            folder.mkdir(parents=True)
            for i in range(20):
                noise = rng.integers(-30, 30, (9, 9, 3))
                Image.fromarray((shade + noise).astype(np.uint8)).save(folder / f"{i}.png")
    out = tmp_path / "out"
    where = [f"--data={tmp_path / 'data'}", f"--model={tmp_path / 'vit'}"]
    launch("--task=domainnet", *where, *SHORT, "--partition=domain", "--local_steps=10", f"--out_dir={out}")
    final = summary(out)["final"]
    assert {f"{domain}/accuracy" for domain in ("clipart", "real", "sketch")} <= set(final)
    capsys.readouterr()
    dogs = tmp_path / "data" / "real" / "dog"
    launch("--task=images", f"--model={out / 'model'}", f"--predict={dogs}")
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(answers) == 20 and {a["label"] for a in answers} <= {"cat", "dog"}
    assert answers[0]["sample"].endswith("dog/0.png")


def test_a_model_and_a_data_set_from_python():
    """What the config names is not loaded; the task still gives loss and metrics."""
    config = vit.Config(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=8,
        patch_size=4,
        num_channels=1,
        image_mean=(0.5,),
        image_std=(0.5,),
        labels=tuple("0123456789"),
    )
    fns, whole = vit.build(config), digits.load()
    few = whole.train.take(np.arange(60))
    dataset = whole._replace(train=few, classes=few.labels)
    run = Config(model="/nowhere", rounds=1, local_steps=1, clients=2, rank=2)
    nothing = whole._replace(test=whole.test.take(np.arange(0)))
    with pytest.raises(ValueError, match="the test split is empty: give it samples"):
        train.run(run, model=(fns, None), dataset=nothing)
    result = train.run(run, model=(fns, fns.init(jax.random.key(0))), dataset=dataset, say=lambda line: None)
    assert result.params["embeddings"]["projection"]["kernel"].shape == (16, 8)
    assert 0 <= result.summary["final"]["accuracy"] <= 1


def test_one_quote_swallows_no_lines(tmp_path):
    """In a csv that is an error, in a tsv a letter."""
    (tmp_path / "a.csv").write_text('text,label\n"never closed,x\nb,y\n')
    with pytest.raises(ValueError, match=r"a\.csv' is no sound csv .*: look at its quotes"):
        tables.read(tmp_path / "a.csv")
    (tmp_path / "a.tsv").write_text('text\tlabel\n"never closed\tx\nb\ty\n')
    assert tables.read(tmp_path / "a.tsv") == {"text": ['"never closed', "b"], "label": ["x", "y"]}


def test_classes_that_are_one_number_keep_their_order():
    """Whatever the seed of Python's hashes."""
    assert text.class_names(["1.0", "2", "01", "1"], None) == ("01", "1", "1.0", "2")
