"""Probes: how much simple classifiers make of frozen features.

Both standardise features by the training set's mean and deviation, choose their settings on the
validation set by `metrics.main_metric`, and are fitted on the training set alone, so that the
validation set still says something afterwards. Equal arguments give equal probes.

Names: n examples, D features, C classes. Features are float [n, D]; targets int labels [n], or
[n, C] of 0 and 1, as in `metrics`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maeast_jax.evaluation import logistic, metrics

STRENGTHS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
COMPONENTS = (0, 64, 128, 256)
NEIGHBOURS = (1, 3, 5, 10, 20, 50, 100, 200)
# Votes are exp(similarity / temperature). On spoken words 0.07 (Wu et al. 2018, arXiv 1805.01978)
# was best for standardised features and 0.15 for their principal components: this is between.
TEMPERATURE = 0.1

_MOST_PCA_ROWS = 20_000  # 256 directions need no more
_BLOCK_VALUES = 1 << 25  # float32 in what is made a block of rows at a time: 128 MiB


@dataclasses.dataclass(frozen=True)
class Probe:
    """A fitted probe.

    Attributes:
      metric: what the settings were chosen by, "accuracy" or "map".
      grid: a dict a setting tried: its values and, under the metric's name, that on validation.
      chosen: the one of `grid` that was best; of equals the smoothest.
      absent: classes that no training example has; their scores are 0.
      scores: features [m, D] to float32 [m, C] in [0, 1], which sum to 1 for labels. ValueError for
        features of another shape, or that are not finite.
    """

    metric: str
    grid: list[dict[str, float]]
    chosen: dict[str, float]
    absent: tuple[int, ...]
    scores: Callable[[np.ndarray], np.ndarray]


def linear(
    train_x: np.ndarray,
    train_y: np.ndarray,
    valid_x: np.ndarray,
    valid_y: np.ndarray,
    num_classes: int,
    strengths: Sequence[float] = STRENGTHS,
) -> Probe:
    """Logistic regression: multinomial for labels, one against the rest for targets of 0 and 1.

    Minimises the mean over examples of the negative log-likelihood (for 0 and 1 summed over
    classes) plus strength / 2 times the squared weights, biases free, by full-batch L-BFGS, from
    the strongest to the weakest and each from the one before. Standardised features are divided by
    sqrt(D), so that a strength means the same for any D; in scikit-learn's terms, on features
    only standardised, C = 1 / (strength n D). Features that are constant do not count.

    The training set is on the device once, in float32.

    Raises:
      ValueError: shapes that do not fit, features that are not finite (it names the row), a target
        out of range, an empty set or grid.
    """
    train_x, train_y = _checked("train", train_x, train_y, num_classes)
    valid_x, valid_y = _checked("valid", valid_x, valid_y, num_classes, train_x.shape[1])
    if not len(strengths) or not min(strengths) > 0:
        raise ValueError(f"strengths={list(strengths)} must be above 0, and one at least")
    scaler = _Scaler.fit(train_x)
    num_features = train_x.shape[1]
    is_present = _is_present(train_y, num_classes)
    num_present = np.count_nonzero(is_present)
    single = train_y.ndim == 1
    if single:
        fit_y = (np.cumsum(is_present) - 1)[train_y].astype(np.int32)
    else:
        fit_y = train_y[:, is_present].astype(np.float32)
    scaled_x, fit_y = jnp.asarray(scaler(train_x)), jnp.asarray(fit_y)
    params = (jnp.zeros((num_features, num_present)), jnp.zeros(num_present))

    def scores(params: tuple, x: np.ndarray) -> np.ndarray:
        from scipy import special

        x = _checked_features("x", x, num_features)
        logits = np.concatenate([scaler(block) @ params[0] + params[1] for block in _blocks(x)])
        result = np.zeros((len(x), num_classes), np.float32)
        result[:, is_present] = special.softmax(logits, axis=1) if single else special.expit(logits)
        return result

    grid, fitted = [], []
    for strength in sorted(strengths, reverse=True):
        params = logistic.fit(scaled_x, fit_y, strength, params)
        fitted.append(jax.tree.map(np.asarray, params))
        metric, value = metrics.main_metric(scores(fitted[-1], valid_x), valid_y)
        grid.append({"strength": float(strength), metric: value})
    best = max(range(len(grid)), key=lambda i: grid[i][metric])
    scores = functools.partial(scores, fitted[best])
    return Probe(metric, grid, grid[best], _absent(is_present), scores)


def knn(
    train_x: np.ndarray,
    train_y: np.ndarray,
    valid_x: np.ndarray,
    valid_y: np.ndarray,
    num_classes: int,
    components: Sequence[int] = COMPONENTS,
    neighbours: Sequence[int] = NEIGHBOURS,
) -> Probe:
    """The nearest neighbours by cosine similarity s, each with exp(s / 0.1) votes for its targets.

    Similarity is between standardised features (components 0), or between so many of their
    principal components, each scaled to deviation 1: there a large direction that all clips share
    (level, recording) counts no more than others. Which, and how many neighbours, is chosen on
    the validation set. With targets of 0 and 1 a score is the share of the votes.

    Settings that the training set is too small for are left out.

    Raises:
      ValueError: as `linear`.
    """
    train_x, train_y = _checked("train", train_x, train_y, num_classes)
    valid_x, valid_y = _checked("valid", valid_x, valid_y, num_classes, train_x.shape[1])
    num_features = train_x.shape[1]
    neighbours = tuple(sorted({k for k in neighbours if 0 < k <= len(train_x)}, reverse=True))
    most = min(len(train_x) - 1, num_features)
    components = sorted({count for count in components if 0 <= count <= most})
    if not neighbours or not components:
        raise ValueError(
            f"no setting fits {len(train_x)} training examples of {num_features} features: allow 1 "
            "neighbour and 0 components"
        )
    scaler = _Scaler.fit(train_x)
    directions = _directions(scaler, train_x, components[-1])
    is_present = _is_present(train_y, num_classes)
    fit_y = jnp.asarray(train_y, jnp.int32 if train_y.ndim == 1 else jnp.float32)

    def embed(count: int, x: np.ndarray) -> np.ndarray:
        scaled = (scaler(block) for block in _blocks(x))
        x = np.concatenate([x @ directions[:, :count] if count else x for x in scaled])
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)

    def scores(count: int, k: int, train: jax.Array, x: np.ndarray) -> np.ndarray:
        x = embed(count, _checked_features("x", x, num_features))
        return _shares(train, fit_y, num_classes, (k,), x)[0]

    grid = []
    for count in components:
        train = jnp.asarray(embed(count, train_x))
        found = _shares(train, fit_y, num_classes, neighbours, embed(count, valid_x))
        for k, valid_scores in zip(neighbours, found, strict=True):
            metric, value = metrics.main_metric(valid_scores, valid_y)
            grid.append({"components": count, "neighbours": k, metric: value})
    best = max(grid, key=lambda row: row[metric])
    count, k = best["components"], best["neighbours"]
    fitted = functools.partial(scores, count, k, jnp.asarray(embed(count, train_x)))
    return Probe(metric, grid, best, _absent(is_present), fitted)


class _Scaler(NamedTuple):
    """Takes off the mean, divides by the deviation and by sqrt(D); constant features become 0."""

    mean_D: np.ndarray
    factor_D: np.ndarray

    @classmethod
    def fit(cls, x: np.ndarray) -> "_Scaler":
        mean_D = np.mean(x, axis=0, dtype=np.float64)
        squares_D = sum(np.sum(np.square(block - mean_D), axis=0) for block in _blocks(x))
        deviation_D = np.sqrt(squares_D / len(x))
        # What is constant but for rounding (a mel band without an FFT bin) would be noise.
        is_constant_D = deviation_D <= 1e-6 * np.abs(mean_D)
        deviation_D[is_constant_D] = np.inf
        factor_D = 1 / (deviation_D * math.sqrt(max(1, np.sum(~is_constant_D))))
        return cls(mean_D.astype(np.float32), factor_D.astype(np.float32))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return (x - self.mean_D) * self.factor_D


def _directions(scaler: _Scaler, x: np.ndarray, count: int) -> np.ndarray:
    """float32 [D, count]: scaled features times these are principal components of deviation 1."""
    if count == 0:
        return np.zeros((x.shape[1], 0), np.float32)
    from sklearn.decomposition import PCA

    x = scaler(x[:: -(-len(x) // _MOST_PCA_ROWS)])
    pca = PCA(count, random_state=0).fit(x)
    variances = pca.explained_variance_
    is_real = variances > 1e-6 * variances[0]  # the others are rounding
    factors = np.where(is_real, 1 / np.sqrt(np.where(is_real, variances, 1.0)), 0.0)
    return (pca.components_.T * factors).astype(np.float32)


def _shares(
    train: jax.Array,
    targets: jax.Array,
    num_classes: int,
    neighbours: tuple[int, ...],
    x: np.ndarray,
) -> np.ndarray:
    """float32 [len(neighbours), m, C]: each row's shares of the votes of its nearest."""
    most_rows = _BLOCK_VALUES // max(len(train), max(neighbours) * num_classes)
    rows = min(max(most_rows, 1), 256)
    found = []
    for start in range(0, len(x), rows):
        block = x[start : start + rows]
        block = np.pad(block, ((0, rows - len(block)), (0, 0)))
        found.append(np.asarray(_block_shares(train, targets, num_classes, neighbours, block)))
    return np.concatenate(found, axis=1)[:, : len(x)]


@functools.partial(jax.jit, static_argnums=(2, 3))
def _block_shares(
    train: jax.Array,
    targets: jax.Array,
    num_classes: int,
    neighbours: tuple[int, ...],
    x: jax.Array,
) -> jax.Array:
    similarities = jnp.matmul(x, train.T, precision=jax.lax.Precision.HIGHEST)
    nearest, index = jax.lax.top_k(similarities, max(neighbours))
    votes = jnp.exp((nearest - 1.0) / TEMPERATURE)  # of 1 at most
    theirs = targets[index]
    if targets.ndim == 1:
        theirs = jax.nn.one_hot(theirs, num_classes)
    shares = jnp.stack(
        [
            jnp.einsum("mk,mkc->mc", votes[:, :k], theirs[:, :k])
            / jnp.sum(votes[:, :k], axis=1, keepdims=True)
            for k in neighbours
        ]
    )
    return jnp.minimum(shares, 1.0)  # the two sums round by themselves


def _blocks(x: np.ndarray) -> Iterator[np.ndarray]:
    rows = max(1, _BLOCK_VALUES // x.shape[1])
    return (x[start : start + rows] for start in range(0, len(x), rows))


def _is_present(targets: np.ndarray, num_classes: int) -> np.ndarray:
    if targets.ndim == 2:
        return targets.any(axis=0)
    return np.bincount(targets, minlength=num_classes) > 0


def _absent(is_present: np.ndarray) -> tuple[int, ...]:
    return tuple(map(int, np.flatnonzero(~is_present)))


def _checked(
    name: str, x: np.ndarray, y: np.ndarray, num_classes: int, num_features: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    x = _checked_features(f"{name}_x", x, num_features)
    y = metrics.checked_targets(y, num_classes)
    if len(x) != len(y):
        raise ValueError(
            f"{name}_x has {len(x)} rows and {name}_y {len(y)}: pass those of the same examples"
        )
    return x, y


def _checked_features(name: str, x: np.ndarray, num_features: int | None) -> np.ndarray:
    """float32 [n, D], finite."""
    x = np.asarray(x)
    if x.ndim != 2 or 0 in x.shape or num_features not in (None, x.shape[1]):
        columns = num_features or "features"
        raise ValueError(
            f"{name} has shape {list(x.shape)}; it must be [examples, {columns}], none of them 0"
        )
    x = x.astype(np.float32, copy=False)
    bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
    if len(bad):
        raise ValueError(
            f"{name} row {bad[0]} holds NaN or infinity ({len(bad)} such rows): leave out that "
            "clip, or mend what embedded it"
        )
    return x
