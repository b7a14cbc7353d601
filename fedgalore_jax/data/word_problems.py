"""Arithmetic word problems: MetaMathQA to GSM8K, and GSM-Symbolic's templates as the small stand-in."""

import ast
import contextlib
import importlib
import operator
import re
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fedgalore_jax.data import packages, sft, tables
from fedgalore_jax.data.dataset import Dataset, Source, split_rows

METAMATH, GSM8K = "meta-math/MetaMathQA", "openai/gsm8k"
TRAIN, VALIDATION, TEST = 2000, 200, 300
APART = 1_000_000
"""Between the seeds of two splits; each problem has a seed of its own, the first's plus its number."""
SHORT_ANSWER = 96
"""New tokens for a line of equations."""


def number(text: str) -> str | None:
    """The answer of a worked solution, as the common harness extracts it: after "####", else the last number.

    Dollar signs, commas and a final dot are dropped. [M: lm-evaluation-harness, gsm8k]

    >>> number("5 * 3 = 15, so $1,015."), number("#### 7.0 and 8"), number("none")
    ('1015', '7.0', None)
    """
    strict = re.search(r"####\s*\$?(-?[\d.,]+)", text)
    found = [strict.group(1)] if strict else re.findall(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+", text)
    return found[-1].replace(",", "").rstrip(".") or None if found else None


def exact_match(texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Share of solutions whose `number` equals the reference's as a number.

    >>> exact_match(["2 + 2 = 4", "I do not know"], ["#### 4.0", "#### 1"])
    {'exact_match': 0.5}
    """

    def value(text):
        try:
            return float(number(text) or "nan")
        except ValueError:
            return float("nan")

    return {
        "exact_match": float(np.mean([value(t) == value(r) for t, r in zip(texts, references, strict=True)]))
    }


def metamath(source: Source) -> Dataset:
    """Trains on MetaMathQA and tests on GSM8K's test split; `classes` are MetaMathQA's kinds of problem.

    Args:
      source: `data` is None for the hub, or a folder with `train` (columns query, response, type) and `test`
        (question, answer) files. A seeded share of the training problems (a tenth, or about 1000 rows)
        validates. A problem is whatever was made from one `original_question` (the query itself where that
        column is missing), and is on one side only: no prompt that validates stands in training. Rows with
        an empty query, of which MetaMathQA has four [V2], are left out.

    References:
      Yu et al., MetaMath (2309.12284); Cobbe et al., GSM8K (2110.14168).
    """
    if source.data is None:
        found = {"train": tables.hub(METAMATH)["train"], "test": tables.hub(GSM8K, "main")["test"]}
    else:
        found = tables.splits(source.data)
        if "test" not in found:
            raise ValueError(
                f"data={source.data!r} has no test file: give test.jsonl with question and answer"
            )
    asked = tables.columns(found["train"], ["query"], "train", blank=True)[0]
    whole = tables.take(found["train"], np.flatnonzero([bool(str(query).strip()) for query in asked]))
    queries, responses, kinds = tables.columns(whole, ["query", "response", "type"], "train")
    rows = _apart(queries, whole.get("original_question", queries), source.seed)
    train, validation = (sft.Pairs([queries[i] for i in r], [responses[i] for i in r]) for r in rows)
    test = sft.Pairs(*tables.columns(found["test"], ["question", "answer"], "test"))
    data = sft.build({"train": train, "validation": validation, "test": test}, source, exact_match)
    names, classes = np.unique(np.array(kinds)[rows[0]][data.classes], return_inverse=True)
    data = data._replace(classes=classes.astype(np.int32), label_names=tuple(names.tolist()))
    if blank := len(asked) - len(queries):
        note = f"{blank} of {len(asked)} training samples have an empty query and were left out"
        data = data._replace(notes=(note, *data.notes))
    return data


def _apart(queries: Sequence[str], problems: Sequence[str], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train and to validate on: whole problems, of which no query stands on both sides."""
    number_of: dict[str, int] = {}
    problem = np.array([number_of.setdefault(str(p), len(number_of)) for p in problems])
    held = split_rows(len(number_of), [min(0.1, 1000 / len(queries))], seed)[1]
    validates = np.isin(problem, held)
    asked = {query for query, here in zip(queries, validates, strict=True) if here}
    # Two problems may share a query, once numbers are masked.
    trains = np.array([query not in asked for query in queries])
    return np.flatnonzero(trains), np.flatnonzero(validates)


def gsm_symbolic(source: Source) -> Dataset:
    """Problems made from GSM-Symbolic's templates; 2000 train, 200 validate, 300 test.

    The answer is short enough for a small model: the equations of the worked solution that hold, then the
    result, "2 * 6 = 12; 12 * 195 = 2340 #### 2340". Every problem has its own seed; a validation problem
    is none of the training problems, a test problem none of both. `classes` are the templates.

    References:
      Mirzadeh et al., GSM-Symbolic (2410.05229); generators of the package reasoning-gym.
    """
    parts, kinds, seen = {}, [], set()
    with generators() as (templates, make):
        for place, (name, size) in enumerate(
            {"test": TEST, "validation": VALIDATION, "train": TRAIN}.items()
        ):
            rng, prompts, answers = np.random.default_rng([source.seed, place]), [], []
            seed = (3 * source.seed + place) * APART
            while len(prompts) < size:
                template = templates[rng.integers(len(templates))]
                problem, seed = make(template, seed), seed + 1
                if problem["question"] in seen:
                    continue
                seen.add(problem["question"])
                prompts.append(problem["question"])
                answers.append(short(problem["metadata"]["answer_cot"], problem["answer"]))
                if name == "train":
                    kinds.append(template)
            parts[name] = sft.Pairs(prompts, answers)
    data = sft.build(parts, source, exact_match, SHORT_ANSWER)
    names, classes = np.unique(np.array(kinds)[data.classes], return_inverse=True)
    return data._replace(classes=classes.astype(np.int32), label_names=tuple(map(str, names)))


@contextlib.contextmanager
def generators() -> Iterator[tuple[list[int], Any]]:
    """The templates' numbers, and `make(template, seed) -> problem`.

    The package imports a dozen others that these modules do not need; they are imported under bare parents,
    and leave no trace.
    """
    root = packages.find("reasoning-gym")["root"]
    names = ("", ".coaching", ".arithmetic", ".arithmetic.gsm_symbolic")
    hidden = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "reasoning_gym"}
    for name in hidden:
        del sys.modules[name]
    try:
        for name in names:
            bare = types.ModuleType(f"reasoning_gym{name}")
            bare.__path__ = [str(root.joinpath(*name.split(".")))]
            sys.modules[bare.__name__] = bare
        module: Any = importlib.import_module("reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic")
        made = module.GSMSymbolicDataset(module.GSMSymbolicDatasetConfig(size=1, seed=0)).generators
        yield list(module.tasks_ok), lambda template, seed: made[template](module.Random(seed), 1.0)
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "reasoning_gym"]:
            del sys.modules[name]
        sys.modules.update(hidden)


def short(worked: str, answer: str) -> str:
    """The equations of a worked solution that hold, then the result.

    >>> short("He works 6 days/week * 2 weeks/month = 12 days/month\\n#### 12", "12")
    '6 * 2 = 12 #### 12'
    """
    text = re.sub(r"(?<=\d)\s*[x×]\s*(?=\d)", "*", worked.split("####")[0])
    text = re.sub(r"(?<=\d),(?=\d{3})|[$£€¥₹]", "", text)
    text = re.sub(r"/?[A-Za-z]+(/[A-Za-z]+)*'?", " ", text)
    kept = []
    for line in re.split(r"\n|[.,;:](?=\s|$)", text):
        for chain in re.findall(r"[-+*/().\d\s]+(?:=[-+*/().\d\s]+)+", line):
            left, *_, right = chain.split("=")
            value, result = _value(left), _value(right)
            if value is not None and result is not None and abs(value - result) < 1e-6 * max(1, abs(value)):
                terms = re.sub(r"\s*([-+*/])\s*", r" \1 ", left.strip())
                if re.search(r"\d [-+*/] ", terms):
                    kept.append(f"{terms} = {result:.10g}")
    return f"{'; '.join(kept)} #### {answer}".strip()


_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def _value(text: str) -> float | None:
    """The value of an arithmetic expression; None where it is none."""

    def walk(node):
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            return float(node.value)
        if isinstance(node, ast.BinOp):
            return _OPERATORS[type(node.op)](walk(node.left), walk(node.right))
        raise ValueError

    try:
        return walk(ast.parse(text.strip(), mode="eval").body)
    except (ValueError, SyntaxError, KeyError, TypeError, ZeroDivisionError):
        return None
