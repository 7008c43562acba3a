"""Probes learn classes, choose on validation alone, and name features that they cannot take."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from maeast_jax.evaluation import probe
from maeast_jax.inference import probes

PROBES = [probe.linear, probe.knn]


def clusters(seed, n=90, num_features=12, num_classes=3, noise=0.5, scale=1.0, offset=0.0):
    """Features around one centre per class; the centres are the same for any seed."""
    centres = 2 * np.random.default_rng(0).standard_normal((num_classes, num_features))
    rng = np.random.default_rng(seed)
    labels = rng.integers(num_classes, size=n)
    x = centres[labels] + noise * rng.standard_normal((n, num_features))
    return (scale * x + offset).astype(np.float32), labels


def one_hot(labels, num_classes=3):
    return np.eye(num_classes, dtype=np.int64)[labels]


def accuracy(fitted, x, labels):
    return np.mean(fitted.scores(x).argmax(axis=1) == labels)


@pytest.mark.parametrize("fit", PROBES)
def test_classes_that_differ_are_learnt(fit):
    fitted = fit(*clusters(1), *clusters(2), 3)
    assert fitted.metric == "accuracy"
    assert fitted.chosen["accuracy"] == max(row["accuracy"] for row in fitted.grid) == 1.0
    x, labels = clusters(3)
    scores = fitted.scores(x)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores.sum(axis=1), 1.0, rtol=1e-5)
    assert np.mean(scores.argmax(axis=1) == labels) == 1.0


@pytest.mark.parametrize("fit", PROBES)
def test_examples_may_have_several_labels(fit):
    (train_x, train_y), (valid_x, valid_y) = clusters(1), clusters(2)
    train_y, valid_y = (np.c_[one_hot(y), y < 2, np.zeros(len(y))] for y in (train_y, valid_y))
    fitted = fit(train_x, train_y, valid_x, valid_y, 5)
    assert fitted.metric == "map"
    assert fitted.chosen["map"] == 1.0
    x, labels = clusters(3)
    scores = fitted.scores(x)
    expected = np.c_[one_hot(labels), labels < 2, np.zeros(len(labels))]
    assert ((scores > 0.5) == expected).mean() > 0.99
    assert (scores[:, 4] == 0).all()


@pytest.mark.parametrize("fit", PROBES)
def test_scale_offset_and_constant_features_do_not_matter(fit):
    plain = fit(*clusters(1), *clusters(2), 3)
    x, _ = clusters(3)
    moved = []
    for seed in (1, 2, 3):
        features, labels = clusters(seed, scale=64.0, offset=32.0)
        # Constant but for rounding, as a mel band without an FFT bin.
        rounding = np.random.default_rng(seed + 20).integers(-1, 2, (len(features), 40))
        constant = (-15.9 + 1e-6 * rounding).astype(np.float32)
        # Constant in training alone, as a band that a microphone does not reach.
        late = np.full((len(features), 1), 0.0 if seed < 3 else 1e6, np.float32)
        moved.append((np.concatenate([features, constant, late], axis=1), labels))
    other = fit(*moved[0], *moved[1], 3)
    np.testing.assert_allclose(other.scores(moved[2][0]), plain.scores(x), atol=1e-3)


@pytest.mark.parametrize("fit", PROBES)
def test_settings_come_from_validation_and_the_fit_from_training(fit):
    train, valid = clusters(1, noise=4), clusters(2, noise=4)
    fitted = fit(*train, *valid, 3)
    assert accuracy(fitted, *valid) == fitted.chosen["accuracy"]
    # With the same setting, another validation set changes nothing.
    names = ("strength",) if fit is probe.linear else ("components", "neighbours")
    settings = ([fitted.chosen[name]] for name in names)
    alone = fit(*train, *clusters(5, noise=4), 3, *settings)
    x, _ = clusters(6)
    np.testing.assert_allclose(alone.scores(x), fitted.scores(x), atol=0.03)


@pytest.mark.parametrize("fit", PROBES)
def test_a_class_without_training_examples_scores_0(fit):
    x, labels = clusters(1)
    kept = labels != 1
    fitted = fit(x[kept], labels[kept], *clusters(2), 4)
    x, labels = clusters(3)
    assert (fitted.scores(x)[:, [1, 3]] == 0).all()
    assert accuracy(fitted, x, labels) == np.mean(labels != 1)


@pytest.mark.parametrize("several", [False, True])
def test_linear_equals_scikit_learn_on_standardised_features(several):
    (train_x, train_y), valid = clusters(1, noise=4, scale=7, offset=3), clusters(2)
    n, num_features = train_x.shape
    columns = [train_y]
    if several:
        columns = [train_y == 0, train_y == 1, train_x[:, 0] > 3]
        train_y = np.stack(columns, axis=1).astype(int)
        valid = valid[0], one_hot(valid[1])
    fitted = probe.linear(train_x, train_y, *valid, 3, strengths=[1e-3])
    scaler = StandardScaler().fit(train_x)
    x, _ = clusters(3, noise=4, scale=7, offset=3)
    theirs = LogisticRegression(C=1 / (1e-3 * n * num_features), tol=1e-8, max_iter=10_000)
    expected = [
        theirs.fit(scaler.transform(train_x).astype(np.float64), y).predict_proba(
            scaler.transform(x)
        )
        for y in columns
    ]
    expected = np.stack([p[:, 1] for p in expected], axis=1) if several else expected[0]
    np.testing.assert_allclose(fitted.scores(x), expected, atol=5e-3)


def test_linear_goes_from_strong_to_weak_and_takes_the_strongest_of_equals():
    fitted = probe.linear(*clusters(1), *clusters(2), 3, strengths=[1e-5, 1e-1, 1e-3])
    assert [row["strength"] for row in fitted.grid] == [1e-1, 1e-3, 1e-5]
    assert fitted.chosen == fitted.grid[0]


def test_of_equal_settings_knn_takes_most_neighbours_and_fewest_components():
    fitted = probe.knn(*clusters(1), *clusters(2), 3, components=[4, 0], neighbours=[5, 20, 10])
    assert [row["accuracy"] for row in fitted.grid] == [1.0] * 6
    assert fitted.chosen == {"components": 0, "neighbours": 20, "accuracy": 1.0}


@pytest.mark.parametrize("k", [1, 7])
def test_knn_equals_scikit_learn_by_cosine(k):
    (train_x, train_y), valid = clusters(1, noise=5), clusters(2)
    fitted = probe.knn(train_x, train_y, *valid, 3, components=[0], neighbours=[k])
    scaler = StandardScaler().fit(train_x)
    theirs = KNeighborsClassifier(
        k, metric="cosine", weights=lambda distances: np.exp(-distances / probes.TEMPERATURE)
    )
    theirs.fit(scaler.transform(train_x), train_y)
    x, _ = clusters(3, noise=5)
    expected = theirs.predict_proba(scaler.transform(x))
    np.testing.assert_allclose(fitted.scores(x), expected, atol=1e-4)


def test_knn_chooses_principal_components_where_a_few_directions_drown_the_others():
    def loud(seed):
        x, labels = clusters(seed, n=300, num_features=80, noise=1.5)
        shared = np.random.default_rng(9).standard_normal((10, 80))
        levels = np.random.default_rng(seed + 100).standard_normal((len(x), 10))
        return x + (10 * levels @ shared).astype(np.float32), labels

    plain = probe.knn(*loud(1), *loud(2), 3, components=[0])
    fitted = probe.knn(*loud(1), *loud(2), 3)
    assert fitted.chosen["components"] == 64
    assert accuracy(fitted, *loud(3)) > accuracy(plain, *loud(3)) + 0.2


def test_principal_components_that_are_only_rounding_count_for_nothing():
    def repeated(seed):
        x, labels = clusters(seed, noise=3)
        return np.concatenate([x, 2 * x, x[:, ::-1]], axis=1), labels

    few = probe.knn(*repeated(1), *repeated(2), 3, components=[12], neighbours=[5])
    many = probe.knn(*repeated(1), *repeated(2), 3, components=[36], neighbours=[5])
    x, _ = repeated(3)
    np.testing.assert_allclose(many.scores(x), few.scores(x), atol=1e-3)


def test_knn_of_a_training_set_smaller_than_the_grid():
    x, labels = clusters(1, n=4)
    fitted = probe.knn(x, labels, *clusters(2), 3)
    assert {row["neighbours"] for row in fitted.grid} == {1, 3}
    assert {row["components"] for row in fitted.grid} == {0}
    assert probe.knn(x[:1], labels[:1], *clusters(2), 3).chosen["neighbours"] == 1


@pytest.mark.parametrize("fit", PROBES)
def test_one_class_and_constant_features(fit):
    x = np.ones((5, 3), np.float32)
    fitted = fit(x, np.full(5, 2), x, np.full(5, 2), 3)
    np.testing.assert_allclose(fitted.scores(x), [[0.0, 0.0, 1.0]] * 5)


@pytest.mark.parametrize("fit", PROBES)
def test_features_that_are_not_finite_are_named(fit):
    (x, y), (valid_x, valid_y) = clusters(1), clusters(2)
    broken = valid_x.copy()
    broken[[4, 7], 0] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"valid_x row 4 holds NaN or infinity \(2 such rows\)"):
        fit(x, y, broken, valid_y, 3)
    with pytest.raises(ValueError, match="x row 4 holds NaN"):
        fit(x, y, valid_x, valid_y, 3).scores(broken)


def test_knn_scores_never_round_past_1():
    train_x, train_y = clusters(0, n=400, num_features=8)
    x = np.random.default_rng(1).normal(size=(2_000, 8))
    fitted = probe.knn(train_x, train_y, train_x, train_y, 3, components=(0,), neighbours=(50,))
    assert fitted.scores(x).max() == 1.0
