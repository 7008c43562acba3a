"""Scores of a classifier against the truth: accuracy, mAP, AUC, d', by class, with intervals.

Names: n examples, C classes. Scores are float [n, C], the larger the likelier. Targets are int
labels [n], one class an example, or [n, C] of 0 and 1, any number of classes an example.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

CONFIDENCE = 0.95
ACCURACY_RESAMPLES = 2_000
# Another seed moves the ends by 5 % of the width; AudioSet's 20,000 x 527 take 20 s of one core.
MAP_RESAMPLES = 200
_BATCH_DRAWS = 1 << 22  # of examples: bounds the memory of resampling


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What `evaluate` finds.

    Attributes:
      metric: the main one: "accuracy" for int labels, "map" for targets of 0 and 1.
      value: its value, a share of 1.
      interval: (low, high) of `value` at `CONFIDENCE`.
      num_examples: n.
      others: further metrics by name. With labels: "balanced_accuracy", the mean recall of the
        classes that have examples, and "f1", its mean over the classes that have examples or
        predictions. With targets of 0 and 1: "auc", its mean over classes, and "d_prime" of it.
      classes: a dict a class: "name", "count" of its examples, then "precision", "recall", "f1" or
        "average_precision", "auc"; NaN where nothing defines the value.
      empty: names of the classes without an example: no mean has them, but for f1.
      confusion: int [C, C], rows true, columns predicted; None for targets of 0 and 1.
    """

    metric: str
    value: float
    interval: tuple[float, float]
    num_examples: int
    others: dict[str, float]
    classes: list[dict[str, Any]]
    empty: list[str]
    confusion: np.ndarray | None


def evaluate(
    scores: np.ndarray,
    targets: np.ndarray,
    class_names: Sequence[str],
    *,
    resamples: int | None = None,
    seed: int = 0,
) -> Evaluation:
    """Everything that is said of a test set; the same of the same arguments.

    The interval is that of a bootstrap over examples, by percentiles. A resample holds some
    examples twice, which by itself lifts average precision (most where positives are few), so mAP's
    percentiles are moved to have its value as the mean of the resamples. Examples of one speaker or
    recording are not independent: the interval knows nothing of that and is then too narrow. At an
    accuracy of 1 it has no width.

    Args:
      resamples: None is 2,000 for accuracy and 200 for mAP.
      seed: of the resampling.

    Raises:
      ValueError: shapes that do not fit, no examples, a score that is NaN, a target out of range,
        two classes of one name, targets without a positive.
    """
    scores, targets = checked(scores, targets)
    num_examples, num_classes = scores.shape
    if len(class_names) != num_classes or len(set(class_names)) != num_classes:
        raise ValueError(
            f"class_names has {len(class_names)} names, {len(set(class_names))} of them different; "
            f"the scores have {num_classes} classes: give each a name of its own"
        )
    single = targets.ndim == 1
    found = _single_label(scores, targets) if single else _multi_label(scores, targets)
    if resamples is None:
        resamples = ACCURACY_RESAMPLES if single else MAP_RESAMPLES
    resampled = _resampled(found.statistic, num_examples, resamples, seed)
    if not single:
        resampled += found.value - np.nanmean(resampled)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.clip(np.nanquantile(resampled, [tail, 1 - tail]), 0.0, 1.0)
    return Evaluation(
        metric="accuracy" if single else "map",
        value=found.value,
        interval=(float(low), float(high)),
        num_examples=num_examples,
        others=found.others,
        classes=[
            {
                "name": name,
                "count": int(found.counts[i]),
                **{column: float(values[i]) for column, values in found.columns.items()},
            }
            for i, name in enumerate(class_names)
        ],
        empty=[name for name, count in zip(class_names, found.counts, strict=True) if not count],
        confusion=found.confusion,
    )


def main_metric(scores: np.ndarray, targets: np.ndarray) -> tuple[str, float]:
    """("accuracy", value) for labels, ("map", value) for 0 and 1. ValueError as `evaluate`."""
    scores, targets = checked(scores, targets)
    if targets.ndim == 1:
        return "accuracy", accuracy(scores, targets)
    return "map", mean_average_precision(scores, targets)


def accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    """The share of examples whose label has the largest score, the first of equal ones."""
    return float(np.mean(np.argmax(scores, axis=1) == labels))


def mean_average_precision(scores: np.ndarray, targets: np.ndarray) -> float:
    """mAP: the mean of `average_precision` over the classes that have a positive."""
    return float(np.nanmean(average_precision(scores, targets)))


def average_precision(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """float64 [C]: scikit-learn's `average_precision_score` of each class, NaN without positives.

    The sum over thresholds of precision times the recall that the threshold adds, nothing
    interpolated; equal scores are one threshold.
    """
    once = np.ones((len(scores), 1), np.int32)
    return _average_precisions(np.asarray(scores), np.asarray(targets), once)[:, 0]


def auc(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """float64 [C]: the area under each class's ROC curve, NaN without positives or negatives.

    The share of pairs of a positive and a negative in which the positive has the larger score;
    equal scores are half a pair.
    """
    from scipy.stats import rankdata

    positives = np.count_nonzero(targets, axis=0).astype(np.float64)
    negatives = len(targets) - positives
    rank_sums = np.sum(np.where(targets, rankdata(scores, axis=0), 0.0), axis=0)
    with np.errstate(invalid="ignore"):
        return (rank_sums - positives * (positives + 1) / 2) / (positives * negatives)


def d_prime(mean_auc: float) -> float:
    """sqrt(2) times the normal quantile of the mean AUC; infinite at 0 and 1.

    The quantile of the mean, not the mean of quantiles, as AST and SSAST report it.
    """
    from scipy.special import ndtri

    return float(math.sqrt(2) * ndtri(mean_auc))


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """int64 [C, C]: how many examples of the row's class were taken for the column's."""
    pairs = np.asarray(labels, np.int64) * num_classes + predictions
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def checked(scores: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores as floats, and targets as int64 [n] or bool [n, C].

    Raises:
      ValueError: they do not fit each other or the module's types; no target is positive.
    """
    scores = np.asarray(scores)
    if scores.ndim != 2 or 0 in scores.shape:
        raise ValueError(
            f"scores have shape {list(scores.shape)}; they must be [examples, classes], none of "
            "them 0: leave out a set without examples"
        )
    if not np.issubdtype(scores.dtype, np.floating):
        scores = scores.astype(np.float32)  # integers, and bfloat16, which numpy cannot sort
    if len(bad := np.flatnonzero(np.isnan(scores).any(axis=1))):
        raise ValueError(f"scores of example {bad[0]} hold NaN ({len(bad)} such): mend the model")
    targets = checked_targets(targets, scores.shape[1])
    if len(targets) != len(scores):
        raise ValueError(
            f"there are {len(targets)} targets for {len(scores)} rows of scores: pass those of the "
            "same examples"
        )
    if targets.ndim == 2 and not targets.any():
        raise ValueError("no example has a positive target, so there is no mAP: check the labels")
    return scores, targets


def checked_targets(targets: np.ndarray, num_classes: int) -> np.ndarray:
    """int64 [n] for labels, bool [n, C] for 0 and 1.

    Raises:
      ValueError: another shape or type, or a value out of range; it names the example.
    """
    targets = np.asarray(targets)
    if targets.ndim == 1 and np.issubdtype(targets.dtype, np.integer):
        if len(bad := np.flatnonzero((targets < 0) | (targets >= num_classes))):
            raise ValueError(
                f"the label of example {bad[0]} is {targets[bad[0]]}; it must be 0 to "
                f"{num_classes - 1} ({len(bad)} are not): check the list of classes"
            )
        return targets.astype(np.int64)
    if targets.ndim == 2 and targets.shape[1] == num_classes:
        if len(bad := np.flatnonzero(((targets != 0) & (targets != 1)).any(axis=1))):
            raise ValueError(
                f"the targets of example {bad[0]} are not all 0 or 1 ({len(bad)} such): round them"
            )
        return targets.astype(bool)
    raise ValueError(
        f"targets are {targets.dtype} {list(targets.shape)}; they must be integer labels [n] or 0 "
        f"and 1 in [n, {num_classes}]"
    )


class _Found(NamedTuple):
    value: float
    statistic: Callable[[np.ndarray], np.ndarray]  # draws of examples [r, n] to values [r]
    counts: np.ndarray
    columns: dict[str, np.ndarray]
    others: dict[str, float]
    confusion: np.ndarray | None


def _single_label(scores: np.ndarray, labels: np.ndarray) -> _Found:
    predictions = np.argmax(scores, axis=1)
    is_right = predictions == labels
    confusion = confusion_matrix(labels, predictions, scores.shape[1])
    right, counts, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN that is meant
        columns = {
            "precision": right / predicted,
            "recall": right / counts,
            "f1": 2 * right / (counts + predicted),
        }
    others = {
        "balanced_accuracy": float(np.nanmean(columns["recall"])),
        "f1": float(np.nanmean(columns["f1"])),
    }

    def statistic(draws: np.ndarray) -> np.ndarray:
        return np.mean(is_right[draws], axis=1)

    return _Found(float(np.mean(is_right)), statistic, counts, columns, others, confusion)


def _multi_label(scores: np.ndarray, targets: np.ndarray) -> _Found:
    counts = np.count_nonzero(targets, axis=0)
    precisions, areas = average_precision(scores, targets), auc(scores, targets)
    mean_auc = float(np.nanmean(areas)) if np.isfinite(areas).any() else math.nan
    scores, targets = scores[:, counts > 0], targets[:, counts > 0]

    def statistic(draws: np.ndarray) -> np.ndarray:
        times = np.stack([np.bincount(draw, minlength=len(scores)) for draw in draws], axis=1)
        precisions = _average_precisions(scores, targets, times.astype(np.int32))
        # A resample may lack all positives of a class, which is then no part of its mean.
        with np.errstate(invalid="ignore"):
            return np.nansum(precisions, axis=0) / np.sum(~np.isnan(precisions), axis=0)

    columns = {"average_precision": precisions, "auc": areas}
    others = {"auc": mean_auc, "d_prime": d_prime(mean_auc)}
    return _Found(float(np.nanmean(precisions)), statistic, counts, columns, others, None)


def _resampled(statistic: Callable, num_examples: int, resamples: int, seed: int) -> np.ndarray:
    """[resamples]: the statistic of examples drawn with replacement, as many as there are."""
    rng = np.random.default_rng(seed)
    rows = max(1, _BATCH_DRAWS // num_examples)
    return np.concatenate(
        [
            statistic(rng.integers(num_examples, size=(min(rows, resamples - row), num_examples)))
            for row in range(0, resamples, rows)
        ]
    )


def _average_precisions(scores: np.ndarray, targets: np.ndarray, times: np.ndarray) -> np.ndarray:
    """[C, r]: average precision where example i is there `times[i, j]` times, times [n, r]."""
    result = np.full((scores.shape[1], times.shape[1]), np.nan)
    for column in range(scores.shape[1]):
        order = np.argsort(-scores[:, column], kind="stable")
        ranked, is_positive = scores[order, column], targets[order, column]
        positives = np.flatnonzero(is_positive)
        if not len(positives):
            continue
        # Recall grows only at thresholds that positives have: sums of what lies between these.
        stops = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]) + 1, len(ranked))
        stops = np.unique(stops[np.searchsorted(stops, positives, side="right")])
        starts = np.append(0, stops[:-1])
        taken = np.cumsum(np.add.reduceat(times[order[: stops[-1]]], starts), axis=0)
        added = np.add.reduceat(times[order[positives]], np.searchsorted(positives, starts))
        found = np.cumsum(added, axis=0)
        with np.errstate(invalid="ignore"):  # a resample without a positive: NaN
            result[column] = np.sum(added * (found / np.maximum(taken, 1)), axis=0) / found[-1]
    return result
