"""Fitted probes: classifiers of feature vectors, which `evaluation.probe` fits.

There are n training examples, D features and C classes.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

# Votes are exp(similarity / temperature). On spoken words 0.07 (Wu et al. 2018, arXiv 1805.01978)
# was best for standardised features and 0.15 for their principal components: this is between.
TEMPERATURE = 0.1


@dataclasses.dataclass(frozen=True, eq=False)
class Scaler:
    """Takes `mean` from features and divides them by `scale`, both [D]. An infinite scale gives 0.

    The rounding is that of scikit-learn's StandardScaler.
    """

    mean: np.ndarray
    scale: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Returns float32 [m, D] of float32 [m, D]."""
        return (x - self.mean.astype(np.float32)) / self.scale.astype(np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Whitening:
    """Turns features [m, D] into principal components [m, count] of deviation 1.

    Attributes:
      components: [count, D].
      mean: [D].
      deviations: [count]; an infinite one gives 0.
    """

    components: np.ndarray
    mean: np.ndarray
    deviations: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        projected = x @ self.components.T
        projected -= self.mean[None] @ self.components.T
        return projected / self.deviations

    def first(self, count: int) -> "Whitening":
        """Returns the whitening to the first `count` components."""
        return Whitening(self.components[:count], self.mean, self.deviations[:count])


@dataclasses.dataclass(frozen=True, eq=False)
class LinearProbe:
    """Logistic regression on standardised features.

    Attributes:
      scaler: standardises.
      weights, biases: float32 [D, present], [present].
      classes: int [present], the numbers of the classes that training had examples of.
      num_classes: C.
      is_multi_label: whether each class is decided alone; otherwise a row of scores sums to 1.
    """

    kind: ClassVar[str] = "linear"
    scaler: Scaler
    weights: np.ndarray
    biases: np.ndarray
    classes: np.ndarray
    num_classes: int
    is_multi_label: bool

    def scores(self, x: np.ndarray) -> np.ndarray:
        """Returns float32 [m, C] in [0, 1] of features [m, D]; 0 for classes without examples.

        Raises ValueError for features that are not finite.
        """
        from scipy import special

        logits = self.scaler(finite("x", x)) @ self.weights + self.biases
        result = np.zeros((len(logits), self.num_classes), np.float32)
        result[:, self.classes] = (
            special.expit(logits) if self.is_multi_label else special.softmax(logits, axis=1)
        )
        return result

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns what `from_arrays` makes the same probe of."""
        return {
            "mean": self.scaler.mean, "scale": self.scaler.scale,
            "weights": self.weights, "biases": self.biases, "classes": self.classes,
        }  # fmt: skip

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, np.ndarray], num_classes: int, is_multi_label: bool
    ) -> "LinearProbe":
        return cls(
            Scaler(arrays["mean"], arrays["scale"]), arrays["weights"], arrays["biases"],
            arrays["classes"], num_classes, is_multi_label,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class KnnProbe:
    """Votes of the nearest training examples, by cosine similarity.

    Attributes:
      scaler: standardises.
      whitening: takes principal components after that; None takes the features themselves.
      train_x: float32 [n, D] or [n, components], after scaler and whitening.
      targets: sparse float32 [n, C] of 0 and 1.
      neighbours: how many vote.
    """

    kind: ClassVar[str] = "knn"
    scaler: Scaler
    whitening: Whitening | None
    train_x: np.ndarray
    targets: Any
    neighbours: int

    def scores(self, x: np.ndarray) -> np.ndarray:
        """Returns float32 [m, C] in [0, 1] of features [m, D]: each class's share of the votes.

        Raises ValueError for features that are not finite.
        """
        return shares(*self.nearest(finite("x", x)), self.targets)

    def nearest(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the distances [m, k] of the nearest examples to features [m, D]; their rows."""
        x = self.scaler(x)
        return self._search.kneighbors(self.whitening(x) if self.whitening else x, self.neighbours)

    @functools.cached_property
    def _search(self):
        from sklearn.neighbors import NearestNeighbors

        return NearestNeighbors(metric="cosine").fit(self.train_x)

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns what `from_arrays` makes the same probe of."""
        arrays = {
            "mean": self.scaler.mean, "scale": self.scaler.scale, "train_x": self.train_x,
            "target_classes": self.targets.indices, "target_starts": self.targets.indptr,
            "neighbours": np.array(self.neighbours),
        }  # fmt: skip
        if self.whitening:
            arrays |= {f"whitening_{name}": value for name, value in vars(self.whitening).items()}
        return arrays

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, np.ndarray], num_classes: int, is_multi_label: bool
    ) -> "KnnProbe":
        """Scores are shares whether clips have one label or several."""
        from scipy.sparse import csr_array

        classes, starts = arrays["target_classes"], arrays["target_starts"]
        ones = np.ones(len(classes), np.float32)
        whitening = None
        if "whitening_components" in arrays:
            names = (field.name for field in dataclasses.fields(Whitening))
            whitening = Whitening(*(arrays[f"whitening_{name}"] for name in names))
        return cls(
            Scaler(arrays["mean"], arrays["scale"]), whitening, arrays["train_x"],
            csr_array((ones, classes, starts), shape=(len(starts) - 1, num_classes)),
            int(arrays["neighbours"]),
        )  # fmt: skip


PROBES = {probe.kind: probe for probe in (LinearProbe, KnnProbe)}


def shares(distances: np.ndarray, index: np.ndarray, targets) -> np.ndarray:
    """Returns float32 [m, C]: the share of the neighbours' votes that each class gets.

    Args:
      distances: [m, k], 1 - cosine similarity of the neighbours.
      index: int [m, k], their rows in `targets`.
      targets: sparse [n, C] of 0 and 1.
    """
    from scipy.sparse import csr_array

    votes = np.exp(-distances / TEMPERATURE)
    votes = (votes / votes.sum(axis=1, keepdims=True)).astype(np.float32)
    rows, k = index.shape
    starts = np.arange(0, rows * k + 1, k)
    votes = csr_array((votes.ravel(), index.ravel(), starts), shape=(rows, targets.shape[0]))
    return np.minimum((votes @ targets).toarray(), 1.0)  # a sum may round past 1


def finite(name: str, x: np.ndarray) -> np.ndarray:
    """Returns `x` as float32; raises ValueError where it holds NaN or infinity."""
    x = np.asarray(x, np.float32)
    bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
    if len(bad):
        raise ValueError(
            f"{name} row {bad[0]} holds NaN or infinity ({len(bad)} such rows): leave out that "
            "clip, or mend the model that embedded it"
        )
    return x
