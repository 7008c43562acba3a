"""Scores of a classifier: accuracy, mAP, AUC, d', values per class, and bootstrap intervals.

There are n examples and C classes. Scores are float [n, C]; a larger score means a likelier class.
Targets are int labels [n] where each example has one class, or [n, C] of 0 and 1 where an example
has any number of classes.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

CONFIDENCE = 0.95
ACCURACY_RESAMPLES = 2_000
# Another seed moves the ends by 5 % of the width; AudioSet's 20,000 x 527 take 20 s of one core.
MAP_RESAMPLES = 200
_BATCH_DRAWS = 1 << 22  # examples drawn at a time, which bounds the memory of resampling


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


def evaluate(
    scores: np.ndarray,
    targets: np.ndarray,
    class_names: Sequence[str],
    *,
    resamples: int | None = None,
    seed: int = 0,
) -> Evaluation:
    """Returns all metrics of a test set; equal arguments give equal results.

    The interval holds the percentiles of a bootstrap over examples. A resample holds some examples
    twice, which alone raises average precision, most where positives are few. So mAP's resamples
    are shifted until their mean is mAP. The interval takes examples as independent; where several
    come from one speaker or recording it is too narrow. At an accuracy of 1 it has no width.

    Args:
      scores: float [n, C].
      targets: int [n], or [n, C] of 0 and 1.
      class_names: [C].
      resamples: None takes 2,000 for accuracy and 200 for mAP.
      seed: seed of the resampling.

    Raises:
      ValueError: shapes that do not fit, no examples, a score that is NaN, a label that is no
        class, targets without a positive.
    """
    scores, targets = checked(scores, targets)
    if targets.ndim == 1:
        return _single_label(scores, targets, class_names, resamples or ACCURACY_RESAMPLES, seed)
    return _multi_label(scores, targets, class_names, resamples or MAP_RESAMPLES, seed)


def main_metric(scores: np.ndarray, targets: np.ndarray) -> tuple[str, float]:
    """Returns ("accuracy", value) for labels and ("map", value) for targets of 0 and 1.

    Of equal largest scores the first class is the prediction.

    Raises:
      ValueError: as `evaluate`.
    """
    scores, targets = checked(scores, targets)
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


def checked(scores: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns scores as float32 or float64, and targets as int64 [n] or bool [n, C].

    Raises:
      ValueError: as `evaluate`.
    """
    scores = np.asarray(scores)
    if scores.ndim != 2 or 0 in scores.shape or len(scores) != len(targets):
        raise ValueError(
            f"scores have shape {list(scores.shape)}; they must be [examples, classes] of the "
            f"{len(targets)} examples that have targets: leave out a set without examples"
        )
    if scores.dtype not in (np.float32, np.float64):
        scores = scores.astype(np.float32)  # numpy cannot sort bfloat16
    if len(bad := np.flatnonzero(np.isnan(scores).any(axis=1))):
        raise ValueError(f"scores of example {bad[0]} hold NaN ({len(bad)} such): mend the model")
    targets = checked_targets(targets, scores.shape[1])
    if targets.ndim == 2 and not targets.any():
        raise ValueError("no example has a positive target, so there is no mAP: check the labels")
    return scores, targets


def checked_targets(targets: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns int64 [n] for labels, bool [n, C] for targets of 0 and 1.

    Raises:
      ValueError: another shape or type, or a label that is no class; the message names the example.
    """
    targets = np.asarray(targets)
    if targets.ndim == 2 and targets.shape[1] == num_classes:
        return targets.astype(bool)
    if targets.ndim != 1 or not np.issubdtype(targets.dtype, np.integer):
        raise ValueError(
            f"targets are {targets.dtype} {list(targets.shape)}; they must be integer labels [n] "
            f"or 0 and 1 in [n, {num_classes}]"
        )
    if len(bad := np.flatnonzero((targets < 0) | (targets >= num_classes))):
        raise ValueError(
            f"the label of example {bad[0]} is {targets[bad[0]]}; it must be 0 to "
            f"{num_classes - 1} ({len(bad)} are not): check the list of classes"
        )
    return targets.astype(np.int64)


def _single_label(
    scores: np.ndarray, labels: np.ndarray, names: Sequence[str], resamples: int, seed: int
) -> Evaluation:
    from sklearn import metrics

    predictions = np.argmax(scores, axis=1)
    is_right = predictions == labels
    resampled = _resampled(
        lambda draws: np.mean(is_right[draws], axis=1), len(scores), resamples, seed
    )
    numbers = np.arange(scores.shape[1])
    precision, recall, f1, counts = metrics.precision_recall_fscore_support(
        labels, predictions, labels=numbers, zero_division=np.nan
    )
    return Evaluation(
        metric="accuracy",
        value=float(np.mean(is_right)),
        interval=_interval(resampled),
        num_examples=len(scores),
        others={"balanced_accuracy": float(np.nanmean(recall)), "f1": float(np.nanmean(f1))},
        classes=_rows(names, counts, precision=precision, recall=recall, f1=f1),
        confusion=metrics.confusion_matrix(labels, predictions, labels=numbers),
    )


def _multi_label(
    scores: np.ndarray, targets: np.ndarray, names: Sequence[str], resamples: int, seed: int
) -> Evaluation:
    counts = np.count_nonzero(targets, axis=0)
    precisions, areas = average_precision(scores, targets), auc(scores, targets)
    value = float(np.nanmean(precisions))
    mean_auc = float(np.nanmean(areas)) if np.isfinite(areas).any() else math.nan
    filled = counts > 0
    resampled = _resampled(
        lambda draws: _mean_average_precisions(scores[:, filled], targets[:, filled], draws),
        len(scores),
        resamples,
        seed,
    )
    return Evaluation(
        metric="map",
        value=value,
        interval=_interval(resampled + value - np.nanmean(resampled)),
        num_examples=len(scores),
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


def _resampled(
    statistic: Callable[[np.ndarray], np.ndarray], num_examples: int, resamples: int, seed: int
) -> np.ndarray:
    """Returns [resamples]: the statistic of n examples drawn with replacement."""
    rng = np.random.default_rng(seed)
    rows = max(1, _BATCH_DRAWS // num_examples)
    return np.concatenate(
        [
            statistic(rng.integers(num_examples, size=(min(rows, resamples - row), num_examples)))
            for row in range(0, resamples, rows)
        ]
    )


def _interval(resampled: np.ndarray) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.clip(np.nanquantile(resampled, [tail, 1 - tail]), 0.0, 1.0)
    return float(low), float(high)


def _rows(names: Sequence[str], counts: np.ndarray, **columns: np.ndarray) -> list[dict[str, Any]]:
    """Returns one dict per class, with Python's own numbers."""
    return [
        {"name": name, "count": int(count), **dict(zip(columns, map(float, values), strict=True))}
        for name, count, *values in zip(names, counts, *columns.values(), strict=True)
    ]
