"""The fit is scikit-learn's, for one label and for several, from any start."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special
from sklearn.linear_model import LogisticRegression

from maeast_jax.evaluation import logistic


def examples(n=60, num_features=8, num_classes=3):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, num_features)).astype(np.float32)
    logits = x @ rng.standard_normal((num_features, num_classes)) + rng.gumbel(size=(n, 1))
    return x, np.argmax(logits + rng.gumbel(size=logits.shape), axis=1)


def zeros(x, num_classes):
    return jnp.zeros((x.shape[1], num_classes)), jnp.zeros(num_classes)


@pytest.mark.parametrize("strength", [1e-1, 1e-3])
def test_one_label_an_example(strength):
    x, labels = examples()
    theirs = LogisticRegression(C=1 / (strength * len(x)), tol=1e-8, max_iter=10_000)
    theirs.fit(x.astype(np.float64), labels)
    weights, biases = logistic.fit(jnp.asarray(x), jnp.asarray(labels), strength, zeros(x, 3))
    ours = special.softmax(x @ np.asarray(weights) + np.asarray(biases), axis=1)
    np.testing.assert_allclose(ours, theirs.predict_proba(x), atol=3e-3)


def test_several_labels_an_example_are_a_classifier_each():
    x, labels = examples()
    targets = np.stack([labels == 0, labels == 1, x[:, 0] > 0.5], axis=1).astype(np.float32)
    params = logistic.fit(jnp.asarray(x), jnp.asarray(targets), 1e-2, zeros(x, 3))
    weights, biases = map(np.asarray, params)
    ours = special.expit(x @ weights + biases)
    for column in range(3):
        theirs = LogisticRegression(C=1 / (1e-2 * len(x)), tol=1e-8, max_iter=10_000)
        theirs.fit(x.astype(np.float64), targets[:, column])
        np.testing.assert_allclose(ours[:, column], theirs.predict_proba(x)[:, 1], atol=3e-3)


def test_another_start_ends_at_the_same_place_and_the_same_start_at_the_same_bits():
    x, labels = examples()
    x, labels = jnp.asarray(x), jnp.asarray(labels)
    first = logistic.fit(x, labels, 1e-2, zeros(x, 3))
    again = logistic.fit(x, labels, 1e-2, zeros(x, 3))
    warm = logistic.fit(x, labels, 1e-2, logistic.fit(x, labels, 1e-1, zeros(x, 3)))
    for one, other, third in zip(first, again, warm, strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_allclose(one, third, atol=3e-2)


def test_classes_that_features_tell_apart_stay_finite():
    x = jnp.asarray([[-1.0], [1.0]])
    weights, biases = logistic.fit(x, jnp.asarray([0, 1]), 1e-7, zeros(x, 2))
    assert np.isfinite(weights).all()
    assert np.isfinite(biases).all()
    assert weights[0, 1] - weights[0, 0] > 3
