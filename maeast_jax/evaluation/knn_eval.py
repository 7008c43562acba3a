"""Nearest neighbours during pretraining: whether the representation, not only the loss, improves.

Features are the encoder's last layer, tokens averaged over time and kept by band, of whole clips;
votes are those of `probe.knn` at one fixed setting, so that the curve compares with itself.
"""

import dataclasses
from typing import Any

import numpy as np
from flax import nnx

from maeast_jax.data import Labelled, labelled
from maeast_jax.evaluation import probe
from maeast_jax.inference import Embedder
from maeast_jax.model import ModelConfig, model_graph

NEIGHBOURS = 10


@dataclasses.dataclass(frozen=True, eq=False)
class KnnEval:
    """A labelled set whose `valid` clips are told by those of `train` nearest to them."""

    train: Labelled
    valid: Labelled

    def describe(self) -> str:
        return (
            f"{len(self.valid):,} clips of {self.valid.text} by {NEIGHBOURS} neighbours among "
            f"{len(self.train):,}, {self.train.num_classes} classes"
        )

    def __call__(
        self, config: ModelConfig, params: Any, statistics: Any, num_frames: int
    ) -> dict[str, float]:
        """{"knn_accuracy"} (of clips with several labels, "knn_map") of a model's weights.

        Clips longer than `num_frames`, the pretraining's, are seen in windows of that many. The
        computation is compiled once, however often it is asked for.
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
    """Opens the splits `train` and `valid` of a labelled set, `most` clips of each (0: all).

    The clips are spread evenly over a split, so that every class of a set sorted by class is there.

    Raises:
      DataError, ValueError: as `labelled.open_labelled`; a split named in `text`.
    """
    if "@" in text:
        raise ValueError(
            f"eval.knn={text!r} names a split, but its `train` tells its `valid`; name the set"
        )
    common = {"data_dir": data_dir, "sample_rate_hz": sample_rate_hz}
    train = labelled.open_labelled(text, "train", **common)
    valid = labelled.open_labelled(text, "valid", **common, class_names=train.class_names)
    return KnnEval(_spread(train, most), _spread(valid, most))


def _spread(clips: Labelled, most: int) -> Labelled:
    count = min(most or len(clips), len(clips))
    return clips.subset(np.arange(count) * len(clips) // count)
