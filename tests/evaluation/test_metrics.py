"""Metrics agree with scikit-learn, also with ties and empty classes; intervals cover the truth."""

import math
import warnings

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
    found = metrics.main_metric(scores, targets.astype(np.float32))
    assert found == ("map", pytest.approx(ours.mean()))


def test_scores_that_are_all_equal_or_infinite_are_ties():
    targets = np.array([[1], [0], [0], [1], [0]])
    for score in (0.0, -np.inf):
        scores = np.full((5, 1), score)
        assert metrics.average_precision(scores, targets) == pytest.approx(0.4)
        assert metrics.auc(scores, targets) == pytest.approx(0.5)


def test_classes_without_positives_or_negatives_are_not_part_of_the_means():
    scores, targets = multi_label(np.random.default_rng(1), 50, 4)
    targets[:, 1] = False
    targets[:, 2] = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = metrics.evaluate(scores, targets, names(4))
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
    found = metrics.evaluate(scores, targets, names(5))
    mean_auc = sklearn.metrics.roc_auc_score(targets, scores)
    assert found.others["d_prime"] == pytest.approx(math.sqrt(2) * norm.ppf(mean_auc))
    # Normal scores a distance d apart have that d'.
    scores, targets = multi_label(np.random.default_rng(3), 20_000, 3, share=0.5, distance=1.5)
    assert metrics.d_prime(metrics.auc(scores, targets).mean()) == pytest.approx(1.5, abs=0.03)


def test_single_label_metrics_leave_out_empty_classes():
    labels = np.array([0, 0, 0, 1, 1])
    predictions = np.array([0, 0, 1, 1, 2])  # nothing is class 2, which is predicted, or class 3
    found = metrics.evaluate(np.eye(4)[predictions], labels, names(4))
    assert (found.metric, found.value, found.num_examples) == ("accuracy", 0.6, 5)
    assert found.empty == ["class 2", "class 3"]
    assert [row["count"] for row in found.classes] == [3, 2, 0, 0]
    expected = {
        "precision": [1.0, 0.5, 0.0, np.nan],
        "recall": [2 / 3, 0.5, np.nan, np.nan],
        "f1": [0.8, 0.5, 0.0, np.nan],
    }
    for key, values in expected.items():
        np.testing.assert_allclose([row[key] for row in found.classes], values)
    assert found.others["f1"] == pytest.approx((0.8 + 0.5 + 0.0) / 3)
    assert found.others["balanced_accuracy"] == pytest.approx((2 / 3 + 0.5) / 2)
    np.testing.assert_array_equal(found.confusion, [[2, 1, 0, 0], [0, 1, 1, 0], [0] * 4, [0] * 4])


def test_of_equal_scores_the_first_class_is_predicted():
    assert metrics.main_metric(np.zeros((4, 3)), np.array([0, 0, 1, 2])) == ("accuracy", 0.5)


def test_interval_of_accuracy_is_wilsons_also_where_all_is_right_or_wrong():
    labels = np.zeros(400, int)
    scores = np.zeros((400, 2))
    scores[:100, 1] = 1.0

    def interval(rows):
        return metrics.evaluate(scores[rows], labels[rows], names(2)).interval

    z, low, high = norm.ppf(0.975), *interval(slice(None))
    middle = (0.75 + z**2 / 800) / (1 + z**2 / 400)
    width = z * math.sqrt(0.75 * 0.25 / 400 + z**2 / (4 * 400**2)) / (1 + z**2 / 400)
    assert (low, high) == pytest.approx((middle - width, middle + width))
    # Six of six says little: the truth may be 61 %.
    assert interval(slice(100, 106)) == (pytest.approx(6 / (6 + z**2)), 1.0)
    assert interval(slice(0, 6)) == (0.0, pytest.approx(z**2 / (6 + z**2)))


def test_interval_of_map_covers_the_mean_over_test_sets(monkeypatch):
    monkeypatch.setattr(metrics, "MAP_RESAMPLES", 100)
    rng = np.random.default_rng(7)

    def draw():
        return multi_label(rng, 500, 8, share=0.02)

    truth = np.mean([metrics.main_metric(*draw())[1] for _ in range(200)])
    found = [metrics.evaluate(*draw(), names(8)) for _ in range(60)]
    covered = [one.interval[0] <= truth <= one.interval[1] for one in found]
    assert np.mean(covered) >= 0.85
    widths = [one.interval[1] - one.interval[0] for one in found]
    middles = [sum(one.interval) / 2 - one.value for one in found]
    assert abs(np.mean(middles)) < 0.1 * np.mean(widths)  # 0.2 where resamples are left as they are


def test_a_resample_counts_an_example_as_often_as_it_was_drawn():
    scores, targets = multi_label(np.random.default_rng(8), 60, 4, share=0.2)
    scores = scores.round(1)
    draws = np.random.default_rng(9).integers(60, size=(3, 60))
    expected = [metrics.main_metric(scores[draw], targets[draw])[1] for draw in draws]
    found = metrics._mean_average_precisions(scores, targets, draws)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("scores", "targets", "message"),
    [
        (np.zeros((0, 2)), np.zeros(0, int), "leave out a set without examples"),
        ([[0.0, 1.0], [math.nan, 0.0]], [0, 1], r"scores of example 1 hold NaN \(1 such\)"),
        (np.zeros((2, 2)), np.zeros((2, 2)), "no example has a positive target"),
    ],
)
def test_scores_and_targets_without_a_metric_are_named(scores, targets, message):
    with pytest.raises(ValueError, match=message):
        metrics.evaluate(np.asarray(scores), np.asarray(targets), names(2))
