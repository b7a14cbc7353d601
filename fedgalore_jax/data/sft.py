"""Supervised fine-tuning of decoders on prompts and answers, with the loss on the answer only.

A model whose tokenizer has a chat template gets the prompt as the user's turn and the answer as the
assistant's. Any other gets the common harness's plain form, "Question: ...\\nAnswer: ..." [M]. An answer
that its form does not end gets the end token. Prompt and answer are tokenised apart, so that training shows
exactly the prompt tokens that generation starts from.
"""

import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedgalore_jax.data import buckets, tables, text, tokens
from fedgalore_jax.data.cache import Arrays, Empty, cached
from fedgalore_jax.data.dataset import IGNORE, Asked, Dataset, Generation, Source, Split
from fedgalore_jax.data.padded import Padded

MAX_LENGTH, MAX_NEW_TOKENS = 512, 256
PLAIN = "Question: {}\nAnswer:"

Score = Callable[[Sequence[str], Sequence[str]], dict[str, float]]


class Pairs(NamedTuple):
    """One split.

    Attributes:
      prompts, answers: n texts each.
    """

    prompts: Sequence[str]
    answers: Sequence[str]


class Encoded(NamedTuple):
    """Tokens of n samples.

    Attributes:
      ids: of all samples, each one's prompt and then its answer, int32.
      starts: `[n]`, where each prompt begins.
      prompts: `[n]`, tokens of each prompt.
      lengths: `[n]`, tokens of prompt and answer.
    """

    ids: np.ndarray
    starts: np.ndarray
    prompts: np.ndarray
    lengths: np.ndarray


def load(source: Source) -> Dataset:
    """A user's table, `--task=sft`: `--text_column=PROMPT,ANSWER` (prompt,answer if not given)."""
    if source.data is None:
        raise ValueError(
            "data is missing: give a jsonl file of prompts and answers, or a folder with train.jsonl"
        )
    wanted = _columns(source)
    found = tables.splits(source.data)
    for name, table in found.items():
        tables.columns(table, wanted, name)
    if source.client_column:
        tables.columns(found["train"], [source.client_column], "train")
    found = tables.three(found, source.seed, (source.client_column,) if source.client_column else ())
    domains, names = text.natural_key(found, source.client_column)
    pairs = {name: Pairs(*tables.columns(table, wanted, name)) for name, table in found.items()}
    data = build(pairs, source, exact_match)
    return data._replace(domains=domains if domains is None else domains[data.classes], domain_names=names,
                         classes=np.zeros_like(data.classes))  # fmt: skip


def _columns(source: Source) -> list[str]:
    """The prompt's and the answer's column."""
    wanted = [name.strip() for name in source.text_column.split(",")]
    if wanted == [Source._field_defaults["text_column"]]:
        wanted = ["prompt", "answer"]
    if len(wanted) != 2:
        raise ValueError(
            f"text_column={source.text_column!r}: give two columns, the prompt's and the answer's"
        )
    return wanted


def read(source: Source, file: str) -> Asked:
    """Prompts to be answered: the prompt's column of a table."""
    prompts = tables.columns(tables.read(pathlib.Path(file)), _columns(source)[:1], file)[0]
    pairs, own = Pairs(prompts, [""] * len(prompts)), tokens.tokenizer(source.model)
    encoded = _encode(source, own, ends(source.model, own), pairs)
    questions, notes = _questions(source, own, encoded, pairs.answers, exact_match, MAX_NEW_TOKENS)
    return Asked(range(1, len(prompts) + 1), questions, tuple(notes))


def exact_match(texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Share of texts that equal their reference, white space at the ends aside.

    >>> exact_match([" Paris ", "Rome"], ["Paris", "Oslo"])
    {'exact_match': 0.5}
    """
    hits = [text.strip() == reference.strip() for text, reference in zip(texts, references, strict=True)]
    return {"exact_match": float(np.mean(hits))}


def build(
    splits: dict[str, Pairs], source: Source, score: Score, max_new_tokens: int = MAX_NEW_TOKENS
) -> Dataset:
    """Tokenises prompts and answers.

    Args:
      splits: `train`, `validation`, `test`.
      source: the model, its limits, the cache.
      score: of generated answers.
      max_new_tokens: of a generated answer; half of the model's positions at most.

    Returns:
      A `Dataset` with labels `[n, L]` and `generation` from `test`. Its `classes` are the rows of
      `splits["train"]` that were kept, for the caller to put classes in their place.

    Raises:
      ValueError: no training answer fits behind its prompt, or the model does not know a token.
    """
    positions = tokens.positions(source.model)
    limit = min(source.max_length or MAX_LENGTH, positions)
    own, notes = tokens.tokenizer(source.model), []
    end = ends(source.model, own)
    pad = _padding(source.model, own, end)
    parts, kept = {}, {}
    encoded = {name: _encode(source, own, end, pairs) for name, pairs in splits.items()}
    for name, (_, _, prompts, lengths) in encoded.items():
        kept[name] = np.flatnonzero(prompts < limit)
        if not len(kept[name]):
            raise ValueError(
                f"no {name} prompt leaves room for an answer in {limit} tokens: raise --max_length"
            )
        if cut := np.count_nonzero(lengths > limit):
            dropped = len(lengths) - len(kept[name])
            notes.append(
                f"{cut} of {len(lengths)} {name} samples were longer than {limit} tokens: {dropped} dropped"
                " (no room for the answer), the others cut"
            )
        parts[name] = _split(encoded[name], kept[name], limit, pad)
    answers = splits["test"].answers
    generation, more = _questions(source, own, encoded["test"], answers, score, max_new_tokens)
    notes += more
    return Dataset(
        parts["train"], parts["validation"], parts["test"], 0, kept["train"].astype(np.int32),
        generation=generation, notes=tuple(notes),
    )  # fmt: skip


def _questions(
    source: Source, own: Any, encoded: Encoded, answers: Sequence[Any], score: Score, max_new_tokens: int
) -> tuple[Generation, list[str]]:
    """Prompts to generate from, and what was cut of them."""
    positions, end = tokens.positions(source.model), ends(source.model, own)
    spans = zip(encoded.starts, encoded.prompts, strict=True)
    prompts = [encoded.ids[start : start + length] for start, length in spans]
    max_new_tokens = min(max_new_tokens, positions // 2)
    room, notes = positions - max_new_tokens, []
    if cut := sum(len(p) > room for p in prompts):
        notes.append(f"{cut} of {len(prompts)} prompts lost their beginning: {room} tokens fit")
    prompts = [p[-room:] for p in prompts]
    length = min(buckets.bucket(max(map(len, prompts))), room)
    pad = _padding(source.model, own, end)
    inputs = {
        "input_ids": buckets.pad_left(prompts, length, pad),
        "attention_mask": buckets.pad_left([np.ones(len(p)) for p in prompts], length, 0),
    }
    understand = functools.partial(decode, own, end)
    references = [str(answer) for answer in answers]
    return Generation(inputs, references, understand, score, end, pad, max_new_tokens), notes


def _padding(model: pathlib.Path, own: Any, end: tuple[int, ...]) -> int:
    pad = own.pad_token_id
    # Some tokenizers were given a padding token that their model was not.
    return end[0] if pad is None or pad >= tokens.vocabulary(model) else pad


def render(own: Any, prompt: str, answer: str) -> tuple[str, str]:
    """A prompt as the model sees it, and the answer as it is to be continued with."""
    if not own.chat_template:
        return PLAIN.format(prompt), f" {answer.strip()}"
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    try:
        before = own.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        whole = own.apply_chat_template(turns, tokenize=False)
    except ImportError as error:
        raise ImportError("chat templates are rendered by jinja2: pip install jinja2") from error
    except Exception as error:  # a template is a program, and may fail in any way
        raise ValueError(
            f"the chat template of {own.name_or_path} fails ({error}): correct it, or remove it"
        ) from error
    if not whole.startswith(before):
        raise ValueError("the chat template changes the prompt once it is answered: it cannot be trained on")
    return before, whole[len(before) :].rstrip("\n")


def ends(model: pathlib.Path, own: Any) -> tuple[int, ...]:
    """Tokens that end an answer: the tokenizer's, `generation_config.json`'s, the chat template's."""
    named, path = [own.eos_token_id], model / "generation_config.json"
    if path.exists():
        more = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        named += more if isinstance(more, list) else [more]
    found = [token for token in named if token is not None]
    answer = render(own, "a", "b")[1]
    if "b" not in answer:
        raise ValueError(
            f"the chat template of {model} leaves the answer out: it cannot be trained on; correct it, or"
            " remove it"
        )
    last = own(answer, add_special_tokens=False)["input_ids"][-1]
    if last in own.all_special_ids or last in own.added_tokens_decoder:
        found.append(last)
    if not found:
        raise ValueError(f"the tokenizer of {model} has no eos_token: name one in tokenizer_config.json")
    size = tokens.vocabulary(model)
    if wrong := [token for token in found if type(token) is not int or not 0 <= token < size]:
        raise ValueError(
            f"the end token {wrong[0]!r} of {model} is not in [0, {size}), the model's vocabulary: correct"
            " eos_token in tokenizer_config.json, or eos_token_id in generation_config.json"
        )
    return tuple(dict.fromkeys(found))


def decode(own: Any, end: tuple[int, ...], generated: np.ndarray) -> list[str]:
    """Texts of generated tokens `[n, T]`, up to the first end token."""
    texts = []
    for row in np.asarray(generated):
        stop = np.flatnonzero(np.isin(row, end))
        texts.append(own.decode(row[: stop[0]] if len(stop) else row, skip_special_tokens=True))
    return texts


def _encode(source: Source, own: Any, end: tuple[int, ...], pairs: Pairs) -> Encoded:
    """Tokens of prompts and of answers, which all end in an end token."""

    def compute(_: Empty) -> Arrays:
        texts = [render(own, str(p), str(a)) for p, a in zip(*pairs, strict=True)]
        # A chat template writes its own special tokens; in the plain form the tokenizer adds its first.
        plain = not own.chat_template
        prompts = own([p for p, _ in texts], add_special_tokens=plain, verbose=False)["input_ids"]
        prompts = [p[:-1] if plain and p[-1] == own.eos_token_id else p for p in prompts]
        answers = own([a for _, a in texts], add_special_tokens=False, verbose=False)["input_ids"]
        answers = [a if a and a[-1] in end else [*a, end[0]] for a in answers]
        rows = [np.asarray(row, np.int32) for both in zip(prompts, answers, strict=True) for row in both]
        return {"ids": np.concatenate(rows), "ends": np.cumsum([len(row) for row in rows])}

    key = (
        tokens.fingerprint(source.model),
        "sft",
        PLAIN,
        list(end),
        list(map(str, pairs.prompts)),
        list(map(str, pairs.answers)),
    )
    arrays = cached(source.cache, key, compute)
    tokens.check(source.model, arrays["ids"])
    prompts, answers = np.diff(arrays["ends"], prepend=0).reshape(-1, 2).T
    return Encoded(arrays["ids"], arrays["ends"][::2] - prompts, prompts, prompts + answers)


def _split(encoded: Encoded, kept: np.ndarray, limit: int, pad: int) -> Split:
    starts, prompts, lengths = (x[kept] for x in encoded[1:])
    lengths = np.minimum(lengths, limit)
    rows = starts, lengths, min(buckets.bucket(lengths.max()), -(-limit // 16) * 16)
    inputs = tokens.inputs(encoded.ids, *rows, pad)
    return Split(inputs, Padded(encoded.ids, *rows, IGNORE, hidden=prompts))
