"""The eight GLUE tasks that are scored by one number (WNLI and the diagnostics left out).

Labels of the test splits are not public, so the official validation split is the test split here, and a
seeded twentieth of the training split (2000 samples at most) validates.

References:
  Wang et al., GLUE (1804.07461).
"""

from fedgalore_jax.data import tables, text
from fedgalore_jax.data.dataset import Dataset, Source, split_rows

HUB = "nyu-mll/glue"
TASKS = {
    "cola": text.Columns(("sentence",), "label", ("unacceptable", "acceptable")),
    "sst2": text.Columns(("sentence",), "label", ("negative", "positive")),
    "mrpc": text.Columns(("sentence1", "sentence2"), "label", ("not_equivalent", "equivalent")),
    "stsb": text.Columns(("sentence1", "sentence2"), "label", ()),
    "qqp": text.Columns(("question1", "question2"), "label", ("not_duplicate", "duplicate")),
    "mnli": text.Columns(("premise", "hypothesis"), "label", ("entailment", "neutral", "contradiction")),
    "qnli": text.Columns(("question", "sentence"), "label", ("entailment", "not_entailment")),
    "rte": text.Columns(("sentence1", "sentence2"), "label", ("entailment", "not_entailment")),
}


def load(name: str, source: Source) -> Dataset:
    """Loads a GLUE task from the hub, or from `source.data`, a folder of files of the same schema.

    Args:
      name: a key of `TASKS`.
      source: `data` holds `train` and `validation` files (MNLI: `validation_matched` and
        `validation_mismatched`), as `tables.splits` reads them.

    Returns:
      A `Dataset`; MNLI's mismatched half is `more_tests["mismatched"]`.
    """
    found = tables.splits(source.data) if source.data else tables.hub(HUB, name)
    official = "validation_matched" if name == "mnli" else "validation"
    if official not in found:
        raise ValueError(f"data={source.data!r} has no {official} file: there are {', '.join(found)}")
    train = found["train"]
    n = len(next(iter(train.values())))
    keep, held = split_rows(n, [min(0.05, 2000 / n)], source.seed)
    parts = {
        "train": tables.take(train, keep),
        "validation": tables.take(train, held),
        "test": found[official],
    }
    if name == "mnli" and "validation_mismatched" in found:
        parts["mismatched"] = found["validation_mismatched"]
    return text.classification(parts, TASKS[name], source)
