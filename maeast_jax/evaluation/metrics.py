"""Scores of a classifier: accuracy, mAP, AUC, d', values per class, and intervals.

There are n examples and C classes. Scores are float [n, C]; a larger score means a likelier class.
Targets are int labels [n] where each example has one class, or [n, C] of 0 and 1 where an example
has any number of classes.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

CONFIDENCE = 0.95
# Another seed moves the ends by 5 % of the width; AudioSet's 20,000 x 527 take 20 s of one core.
MAP_RESAMPLES = 200


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    Attributes:
      metric: name of the main metric: "accuracy" for int labels, "map" for targets of 0 and 1.
      value: the main metric, from 0 to 1.
      interval: (low, high) of `value` at `CONFIDENCE`.
      num_examples: n.
      others: further metrics by name. With labels: "balanced_accuracy", the mean recall of the
        classes that have examples, and "f1", its mean over the classes that have examples or
        predictions. With targets of 0 and 1: "auc", its mean over classes, and its "d_prime".
      classes: one dict per class: "name", "count" of its examples, then "precision", "recall", "f1"
        or "average_precision", "auc"; NaN where a value is not defined.
      confusion: int [C, C], rows true, columns predicted; None for targets of 0 and 1.
    """

    metric: str
    value: float
    interval: tuple[float, float]
    num_examples: int
    others: dict[str, float]
    classes: list[dict[str, Any]]
    confusion: np.ndarray | None

    @property
    def empty(self) -> list[str]:
        """Names of the classes without an example; only the mean of f1 may include them."""
        return [row["name"] for row in self.classes if not row["count"]]


def evaluate(scores: np.ndarray, targets: np.ndarray, class_names: Sequence[str]) -> Evaluation:
    """Returns all metrics of a test set; equal arguments give equal results.

    The interval of an accuracy is Wilson's, which also fits few examples and an accuracy of 0 or 1.
    That of mAP holds the percentiles of a bootstrap over examples. A resample holds some examples
    twice, which alone raises average precision, most where positives are few. So the resamples are
    shifted until their mean is mAP; at a mAP of 1 they leave no width. Both intervals take examples
    as independent; where several come from one speaker or recording they are too narrow.

    Args:
      scores: float [n, C].
      targets: int [n], or [n, C] of 0 and 1.
      class_names: [C].

    Raises:
      ValueError: no examples, a score that is NaN, targets without a positive.
    """
    targets = _checked(scores, targets)
    if targets.ndim == 1:
        return _single_label(scores, targets, class_names)
    return _multi_label(scores, targets, class_names)


def main_metric(scores: np.ndarray, targets: np.ndarray) -> tuple[str, float]:
    """Returns ("accuracy", value) for labels and ("map", value) for targets of 0 and 1.

    Of equal largest scores the first class is the prediction.

    Raises:
      ValueError: as `evaluate`.
    """
    targets = _checked(scores, targets)
    if targets.ndim == 1:
        return "accuracy", float(np.mean(np.argmax(scores, axis=1) == targets))
    return "map", float(np.nanmean(average_precision(scores, targets)))


def average_precision(
    scores: np.ndarray, targets: np.ndarray, times: np.ndarray | None = None
) -> np.ndarray:
    """Returns scikit-learn's `average_precision_score` of each class, NaN without positives.

    That is the sum over thresholds of precision times the recall that the threshold adds; equal
    scores are one threshold. scikit-learn would sort the scores again for each resample of a
    bootstrap; this function sorts them once for all resamples.

    Args:
      scores: float [n, C].
      targets: bool [n, C].
      times: int [n, r]: in resample j, example i counts `times[i, j]` times. None counts each once.

    Returns:
      float64 [C], or [C, r] where `times` is given.
    """
    weights = np.ones((len(scores), 1), np.int32) if times is None else times
    result = np.full((scores.shape[1], weights.shape[1]), np.nan)
    for column in range(scores.shape[1]):
        order = np.argsort(-scores[:, column], kind="stable")
        ranked, is_positive = scores[order, column], targets[order, column]
        positives = np.flatnonzero(is_positive)
        if not len(positives):
            continue
        # Recall grows only at the thresholds of positives, so sums over the stretches between
        # these thresholds are enough.
        stops = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]) + 1, len(ranked))
        stops = np.unique(stops[np.searchsorted(stops, positives, side="right")])
        starts = np.append(0, stops[:-1])
        taken = np.cumsum(np.add.reduceat(weights[order[: stops[-1]]], starts), axis=0)
        added = np.add.reduceat(weights[order[positives]], np.searchsorted(positives, starts))
        found = np.cumsum(added, axis=0)
        with np.errstate(invalid="ignore"):  # a resample without a positive gives NaN
            result[column] = np.sum(added * (found / np.maximum(taken, 1)), axis=0) / found[-1]
    return result[:, 0] if times is None else result


def auc(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Returns float64 [C]: areas under ROC curves, NaN for a class without positives or negatives.

    scikit-learn's `roc_auc_score` gives the same areas in 11 s instead of 1.5 s for AudioSet.
    """
    from scipy.stats import rankdata

    positives = np.count_nonzero(targets, axis=0).astype(np.float64)
    negatives = len(targets) - positives
    rank_sums = np.sum(np.where(targets, rankdata(scores, axis=0), 0.0), axis=0)
    with np.errstate(invalid="ignore"):
        return (rank_sums - positives * (positives + 1) / 2) / (positives * negatives)


def d_prime(mean_auc: float) -> float:
    """Returns sqrt(2) times the normal quantile of the mean AUC; it is infinite at 0 and 1.

    AST and SSAST report the quantile of the mean too, not the mean of quantiles.
    """
    from scipy.special import ndtri

    return float(math.sqrt(2) * ndtri(mean_auc))


def _checked(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Returns targets as integers [n] or bool [n, C]; raises ValueError as `evaluate` does."""
    if not len(scores):
        raise ValueError("there are no examples to score: leave out a set without examples")
    if len(bad := np.flatnonzero(np.isnan(scores).any(axis=1))):
        raise ValueError(f"scores of example {bad[0]} hold NaN ({len(bad)} such): mend the model")
    if targets.ndim == 2:
        targets = targets.astype(bool)
        if not targets.any():
            raise ValueError(
                "no example has a positive target, so there is no mAP: check the labels"
            )
    return targets


def _single_label(scores: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Evaluation:
    from scipy.stats import binomtest
    from sklearn import metrics

    predictions = np.argmax(scores, axis=1)
    is_right = predictions == labels
    right = binomtest(np.count_nonzero(is_right), len(is_right))
    interval = right.proportion_ci(CONFIDENCE, method="wilson")
    numbers = np.arange(scores.shape[1])
    precision, recall, f1, counts = metrics.precision_recall_fscore_support(
        labels, predictions, labels=numbers, zero_division=np.nan
    )
    return Evaluation(
        metric="accuracy",
        value=float(np.mean(is_right)),
        interval=(float(interval.low), float(interval.high)),
        num_examples=len(labels),
        others={"balanced_accuracy": float(np.nanmean(recall)), "f1": float(np.nanmean(f1))},
        classes=_rows(names, counts, precision=precision, recall=recall, f1=f1),
        confusion=metrics.confusion_matrix(labels, predictions, labels=numbers),
    )


def _multi_label(scores: np.ndarray, targets: np.ndarray, names: Sequence[str]) -> Evaluation:
    n, rng = len(scores), np.random.default_rng(0)
    counts = np.count_nonzero(targets, axis=0)
    precisions, areas = average_precision(scores, targets), auc(scores, targets)
    value = float(np.nanmean(precisions))
    mean_auc = float(np.nanmean(areas)) if np.isfinite(areas).any() else math.nan
    filled = counts > 0
    draws = rng.integers(n, size=(MAP_RESAMPLES, n))
    resampled = _mean_average_precisions(scores[:, filled], targets[:, filled], draws)
    resampled += value - np.nanmean(resampled)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.clip(np.nanquantile(resampled, [tail, 1 - tail]), 0.0, 1.0)
    return Evaluation(
        metric="map",
        value=value,
        interval=(float(low), float(high)),
        num_examples=n,
        others={"auc": mean_auc, "d_prime": d_prime(mean_auc)},
        classes=_rows(names, counts, average_precision=precisions, auc=areas),
        confusion=None,
    )


def _mean_average_precisions(
    scores: np.ndarray, targets: np.ndarray, draws: np.ndarray
) -> np.ndarray:
    """Returns float64 [r]: mAP of each resample, whose examples are int [r, n] `draws`."""
    times = np.stack([np.bincount(draw, minlength=len(scores)) for draw in draws], axis=1)
    precisions = average_precision(scores, targets, times.astype(np.int32))
    # A class without positives in a resample is not part of that resample's mean.
    with np.errstate(invalid="ignore"):
        return np.nansum(precisions, axis=0) / np.sum(~np.isnan(precisions), axis=0)


def _rows(names: Sequence[str], counts: np.ndarray, **columns: np.ndarray) -> list[dict[str, Any]]:
    """Returns one dict per class, with Python's own numbers."""
    return [
        {"name": name, "count": int(count), **dict(zip(columns, map(float, values), strict=True))}
        for name, count, *values in zip(names, counts, *columns.values(), strict=True)
    ]
