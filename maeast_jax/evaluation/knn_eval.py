"""Accuracy of nearest neighbours during pretraining: does the representation improve with the loss?

Features are the encoder's last layer for whole clips, averaged over time and kept per band. Votes
are those of `probe.knn` at one fixed setting, so that the points of the curve compare.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import nnx

from maeast_jax.data import Labelled, labelled
from maeast_jax.evaluation import checks, probe
from maeast_jax.inference import Embedder
from maeast_jax.model import ModelConfig, model_graph

NEIGHBOURS = 10


@dataclasses.dataclass(frozen=True, eq=False)
class KnnEval:
    """Scores a model on the clips of `valid` by their nearest neighbours among those of `train`."""

    train: Labelled
    valid: Labelled
    warnings: Sequence[str]

    def describe(self) -> str:
        """Returns the data sets, their sizes and warnings, for the plan that a run prints."""
        sizes = (
            f"{len(self.valid):,} clips of {self.valid.text} by {NEIGHBOURS} neighbours among "
            f"{len(self.train):,}, {self.train.num_classes} classes"
        )
        return "\n".join([sizes, *self.warnings])

    def __call__(
        self, config: ModelConfig, params: Any, statistics: Any, num_frames: int
    ) -> dict[str, float]:
        """Returns {"knn_accuracy": share}, or {"knn_map": mAP} where clips have several labels.

        Clips longer than `num_frames` are embedded in windows of that many frames, as in
        pretraining. The embedding is compiled once for all calls.

        Args:
          config: the model's architecture.
          params, statistics: its weights and running statistics, nnx states.
          num_frames: frames per clip in pretraining.
        """
        model = nnx.merge(model_graph(config), params, statistics)
        patch_frames, _ = config.patch_shape
        window_frames = num_frames // patch_frames * patch_frames
        embedder = Embedder(model, pool="time", window_frames=window_frames)
        train_x, train_y, _ = labelled.embedded(self.train, embedder)
        valid_x, valid_y, _ = labelled.embedded(self.valid, embedder)
        neighbours = (min(NEIGHBOURS, len(train_x)),)
        fitted = probe.knn(
            train_x, train_y, valid_x, valid_y, self.train.num_classes, (0,), neighbours
        )
        return {f"knn_{fitted.metric}": fitted.chosen[fitted.metric]}


def open_knn(text: str, data_dir: str | None, sample_rate_hz: int | None, most: int) -> KnnEval:
    """Opens the splits `train` and `valid` of a labelled data set.

    Args:
      text: name of the data set.
      data_dir: folder of the data sets.
      sample_rate_hz: as in `labelled.open_labelled`.
      most: the largest number of clips per split, spread evenly so that a set sorted by class keeps
        all its classes; 0 takes all.

    Raises:
      DataError, ValueError: as `labelled.open_labelled` and `checks.check`, or where `text` names a
        split.
    """
    if "@" in text:
        raise ValueError(
            f"eval.knn={text!r} names a split, but the splits `train` and `valid` are both used; "
            "name the set"
        )
    common = {"data_dir": data_dir, "sample_rate_hz": sample_rate_hz}
    train = labelled.open_labelled(text, "train", **common)
    valid = labelled.open_labelled(text, "valid", **common, class_names=train.class_names)
    train, valid = _spread(train, most), _spread(valid, most)
    return KnnEval(train, valid, checks.check(train, valid))


def _spread(clips: Labelled, most: int) -> Labelled:
    count = min(most or len(clips), len(clips))
    return clips.subset(np.arange(count) * len(clips) // count)
