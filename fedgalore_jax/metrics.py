"""Metrics of a split, from all its logits at once. NumPy, on the host."""

import numpy as np


def classification(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy and mean cross-entropy.

    Args:
      logits: `[n, classes]`.
      labels: `[n]` class indices.

    Returns:
      `{"accuracy": share in [0, 1], "loss": nats}`.

    >>> classification(np.array([[2., 0.], [0., 3.]]), np.array([0, 0]))["accuracy"]
    0.5
    """
    logits = logits.astype(np.float64)
    top = logits.max(1, keepdims=True)
    log_z = np.log(np.exp(logits - top).sum(1)) + top[:, 0]
    loss = log_z - logits[np.arange(len(labels)), labels]
    return {"accuracy": float((logits.argmax(1) == labels).mean()), "loss": float(loss.mean())}


def f1(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """`classification`, and the harmonic mean of precision and recall of class 1; 0 without a true positive.

    >>> f1(np.array([[0., 1.], [0., 1.]]), np.array([0, 1]))["f1"]
    0.6666666666666666
    """
    guess = logits.argmax(1)
    hits = ((guess == 1) & (labels == 1)).sum()
    value = 2 * hits / max((guess == 1).sum() + (labels == 1).sum(), 1)
    return {"f1": float(value)} | classification(logits, labels)


def matthews(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """`classification`, and the correlation of two-class guesses with labels; 0 where either is constant.

    >>> matthews(np.array([[0., 1.], [1., 0.]]), np.array([1, 0]))["matthews"]
    1.0
    """
    return {"matthews": _correlation(logits.argmax(1), labels)} | classification(logits, labels)


def regression(values: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Pearson's and Spearman's correlation, and the mean squared error (as `loss`).

    Args:
      values: `[n]`.
      targets: `[n]`.
    """
    return {
        "pearson": _correlation(values, targets),
        "spearman": _correlation(_ranks(values), _ranks(targets)),
        "loss": float(np.mean((values.astype(np.float64) - targets) ** 2)),
    }


def answers(outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Share of answer tokens predicted right, and the mean nats of one.

    Args:
      outputs: `[n, 3]`, as `tasks.answer_outputs`.
      labels: not needed: the outputs hold what was compared.
    """
    del labels
    nll, count, right = outputs.astype(np.float64).sum(0)
    return {"token_accuracy": float(right / max(count, 1)), "loss": float(nll / max(count, 1))}


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    x, y = (v.astype(np.float64) - v.mean(dtype=np.float64) for v in (x, y))
    scale = np.sqrt((x @ x) * (y @ y))
    return float(np.clip(x @ y / scale, -1, 1)) if scale > 0 else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks, ties given their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
