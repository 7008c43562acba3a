"""Metrics agree with scikit-learn, ties and empty classes included; intervals cover the truth."""

import math
import time
import warnings

import ml_dtypes
import numpy as np
import pytest
import sklearn.metrics
from scipy.stats import norm

from maeast_jax.evaluation import metrics


def names(count):
    return [f"class {i}" for i in range(count)]


def multi_label(rng, n, num_classes, share=0.1, distance=1.5):
    targets = rng.random((n, num_classes)) < share
    return rng.standard_normal((n, num_classes)) + distance * targets, targets


@pytest.mark.parametrize("decimals", [0, 1, 8])  # few decimals: many equal scores
def test_average_precision_and_auc_are_scikit_learns(decimals):
    scores, targets = multi_label(np.random.default_rng(0), 200, 6)
    scores = scores.round(decimals)
    ours = metrics.average_precision(scores, targets)
    theirs = sklearn.metrics.average_precision_score(targets, scores, average=None)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    theirs = sklearn.metrics.roc_auc_score(targets, scores, average=None)
    np.testing.assert_allclose(metrics.auc(scores, targets), theirs, rtol=1e-12)
    assert metrics.mean_average_precision(scores, targets) == pytest.approx(ours.mean())


def test_scores_that_are_all_equal_or_infinite_are_ties():
    targets = np.array([[1], [0], [0], [1], [0]])
    for score in (0.0, -np.inf, np.inf):
        scores = np.full((5, 1), score)
        assert metrics.average_precision(scores, targets) == pytest.approx(0.4)
        assert metrics.auc(scores, targets) == pytest.approx(0.5)


def test_classes_without_positives_or_negatives_are_counted_and_no_part_of_the_means():
    scores, targets = multi_label(np.random.default_rng(1), 50, 4)
    targets[:, 1] = False
    targets[:, 2] = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = metrics.evaluate(scores, targets, names(4), resamples=20)
    assert found.empty == ["class 1"]
    rows = found.classes
    assert [math.isnan(row["average_precision"]) for row in rows] == [False, True, False, False]
    assert [math.isnan(row["auc"]) for row in rows] == [False, True, True, False]
    assert rows[2]["average_precision"] == 1.0
    assert [row["count"] for row in rows] == list(targets.sum(axis=0))
    assert found.value == pytest.approx(
        np.mean([rows[i]["average_precision"] for i in (0, 2, 3)]), rel=1e-12
    )
    assert found.others["auc"] == pytest.approx(np.mean([rows[i]["auc"] for i in (0, 3)]))


def test_targets_that_are_all_positive_have_no_auc():
    found = metrics.evaluate(np.ones((3, 2)), np.ones((3, 2), int), names(2))
    assert found.value == 1.0
    assert math.isnan(found.others["auc"])
    assert math.isnan(found.others["d_prime"])


def test_d_prime_is_of_the_mean_auc():
    assert metrics.d_prime(0.5) == 0.0
    assert metrics.d_prime(1.0) == math.inf
    # PANNs' CNN14 (arXiv 1912.10211): AUC 0.973 and d' 2.732, from more digits than these.
    assert metrics.d_prime(0.973) == pytest.approx(2.732, abs=0.02)
    scores, targets = multi_label(np.random.default_rng(2), 100, 5)
    found = metrics.evaluate(scores, targets, names(5), resamples=5)
    mean_auc = sklearn.metrics.roc_auc_score(targets, scores)
    assert found.others["d_prime"] == pytest.approx(math.sqrt(2) * norm.ppf(mean_auc))
    # Normal scores a distance d apart have that d'.
    scores, targets = multi_label(np.random.default_rng(3), 20_000, 3, share=0.5, distance=1.5)
    assert metrics.d_prime(metrics.auc(scores, targets).mean()) == pytest.approx(1.5, abs=0.03)


def test_single_label_metrics_are_scikit_learns():
    rng = np.random.default_rng(4)
    labels = rng.integers(5, size=300)
    labels[labels == 3] = 2  # a class without examples, which is predicted
    scores = rng.standard_normal((300, 6)).round(1)
    scores[np.arange(300), labels] += 1
    scores[:, 5] = -9.0  # one that is neither
    found = metrics.evaluate(scores, labels, names(6))
    predictions = scores.argmax(axis=1)
    assert found.metric == "accuracy"
    assert found.value == sklearn.metrics.accuracy_score(labels, predictions)
    assert found.value == metrics.accuracy(scores, labels)
    assert found.num_examples == 300
    assert found.empty == ["class 3", "class 5"]
    np.testing.assert_array_equal(
        found.confusion, sklearn.metrics.confusion_matrix(labels, predictions, labels=range(6))
    )
    theirs = sklearn.metrics.precision_recall_fscore_support(
        labels, predictions, labels=range(6), zero_division=np.nan
    )
    for key, expected in zip(("precision", "recall", "f1", "count"), theirs, strict=True):
        np.testing.assert_allclose([row[key] for row in found.classes], expected)
    assert found.others["f1"] == pytest.approx(
        sklearn.metrics.f1_score(labels, predictions, average="macro", zero_division=0)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of predictions that are no label
        balanced = sklearn.metrics.balanced_accuracy_score(labels, predictions)
    assert found.others["balanced_accuracy"] == pytest.approx(balanced)


def test_of_equal_scores_the_first_class_is_predicted():
    assert metrics.accuracy(np.zeros((4, 3)), np.array([0, 0, 1, 2])) == 0.5


def test_the_main_metric_alone_is_that_of_the_evaluation():
    scores, targets = multi_label(np.random.default_rng(5), 40, 3)
    for truth in (targets, targets.astype(np.float32), targets.argmax(axis=1)):
        found = metrics.evaluate(scores, truth, names(3), resamples=5)
        assert metrics.main_metric(scores, truth) == (found.metric, pytest.approx(found.value))


def test_scores_of_the_device_s_types_are_taken():
    scores = np.array([[0.0, 1.0], [2.0, 1.0]])
    for dtype in (np.float16, ml_dtypes.bfloat16, np.int32):
        assert metrics.main_metric(scores.astype(dtype), np.array([1, 0])) == ("accuracy", 1.0)


def test_interval_of_accuracy_is_binomial_and_the_same_again():
    labels = np.zeros(400, int)
    scores = np.zeros((400, 2))
    scores[:100, 1] = 1.0
    found = metrics.evaluate(scores, labels, names(2))
    error = math.sqrt(0.75 * 0.25 / 400)
    assert found.interval == pytest.approx((0.75 - 1.96 * error, 0.75 + 1.96 * error), abs=0.004)
    assert metrics.evaluate(scores, labels, names(2)).interval == found.interval
    assert metrics.evaluate(scores, labels, names(2), seed=1).interval != found.interval
    assert metrics.evaluate(scores[100:], labels[100:], names(2)).interval == (1.0, 1.0)
    assert metrics.evaluate(scores[:1], labels[:1], names(2)).interval == (0.0, 0.0)


def test_interval_of_accuracy_is_quick():
    rng = np.random.default_rng(6)
    scores, labels = rng.random((2_000, 20)), rng.integers(20, size=2_000)
    start = time.process_time()
    metrics.evaluate(scores, labels, names(20), resamples=2_000)
    assert time.process_time() - start < 5.0  # a resample at a time takes a minute


def test_interval_of_map_covers_the_mean_over_test_sets():
    rng = np.random.default_rng(7)

    def draw():
        return multi_label(rng, 500, 8, share=0.02)

    truth = np.mean([metrics.mean_average_precision(*draw()) for _ in range(200)])
    found = [metrics.evaluate(*draw(), names(8), resamples=100) for _ in range(60)]
    covered = [one.interval[0] <= truth <= one.interval[1] for one in found]
    assert np.mean(covered) >= 0.85
    widths = [one.interval[1] - one.interval[0] for one in found]
    middles = [sum(one.interval) / 2 - one.value for one in found]
    assert abs(np.mean(middles)) < 0.1 * np.mean(widths)  # 0.2 where resamples are left as they are


def test_a_resample_counts_an_example_as_often_as_it_was_drawn():
    scores, targets = multi_label(np.random.default_rng(8), 60, 4, share=0.2)
    scores = scores.round(1)
    draws = np.random.default_rng(9).integers(60, size=(3, 60))
    statistic = metrics._multi_label(scores, targets).statistic
    expected = [metrics.mean_average_precision(scores[draw], targets[draw]) for draw in draws]
    np.testing.assert_allclose(statistic(draws), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("scores", "targets", "message"),
    [
        (np.zeros((0, 2)), np.zeros(0, int), r"shape \[0, 2\]; .* set without examples"),
        (np.zeros(3), np.zeros(3, int), r"scores have shape \[3\]"),
        ([[0.0, 1.0], [math.nan, 0.0]], [0, 1], r"scores of example 1 hold NaN \(1 such\)"),
        (np.zeros((2, 2)), [0, 2], r"label of example 1 is 2; it must be 0 to 1 \(1 are not\)"),
        (np.zeros((2, 2)), [-1, -1], r"label of example 0 is -1; .* \(2 are not\)"),
        (np.zeros((2, 2)), [0, 1, 1], "3 targets for 2 rows of scores"),
        (np.zeros((2, 2)), [[0, 1], [0, 0.5]], r"example 1 are not all 0 or 1 \(1 such\)"),
        (np.zeros((2, 2)), np.zeros((2, 2)), "no example has a positive target"),
        (np.zeros((2, 2)), [[0, 1, 0]] * 2, r"int64 \[2, 3\]; .* 0 and 1 in \[n, 2\]"),
        (np.zeros((2, 2)), [0.0, 1.0], r"targets are float64 \[2\]"),
    ],
)
def test_what_does_not_fit_is_named(scores, targets, message):
    with pytest.raises(ValueError, match=message):
        metrics.evaluate(np.asarray(scores), np.asarray(targets), names(2))


@pytest.mark.parametrize("class_names", [["a"], ["a", "a"], ["a", "b", "c"]])
def test_classes_need_a_name_each(class_names):
    with pytest.raises(ValueError, match=r"the scores have 2 classes"):
        metrics.evaluate(np.zeros((1, 2)), np.zeros(1, int), class_names)
