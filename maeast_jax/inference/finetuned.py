"""Fine-tuned classifiers: what a checkpoint of `maeast_jax.finetune` says of itself."""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from maeast_jax import checkpoint
from maeast_jax import config as configuration
from maeast_jax.interop import fairseq, hub
from maeast_jax.model import Classifier, HeadConfig, ModelConfig, classifier_graph

_HOW_TO_FINETUNE = (
    "fine-tune it first: python -m maeast_jax.finetune --config=configs/finetune_folder.py "
    "--config.init_from={} --workdir=NEW (docs/finetuning.md)"
)


@dataclasses.dataclass(frozen=True)
class Finetuned:
    """A checkpoint of a fine-tuned classifier; its weights are read on demand.

    Attributes:
      path: the checkpoint's folder.
      class_names: the classes in the order of the outputs.
      is_multi_label: whether a clip may have several classes, or none.
      loss: name of the loss, which decides how logits become probabilities.
      model, head: the configuration of the classifier, with the compute type of its training.
      num_frames: the longest clip that training and evaluation take whole, in frames of 10 ms.
      longest_seconds: length of the longest training clip; None where the checkpoint, of an earlier
        version, does not say.
      notes: lines for the terminal on what the checkpoint does not say.
      read_weights: reads (parameters, statistics), nested dicts of numpy arrays, once.
    """

    path: str
    class_names: tuple[str, ...]
    is_multi_label: bool
    loss: str
    model: ModelConfig
    head: HeadConfig
    num_frames: int
    longest_seconds: float | None
    notes: tuple[str, ...]
    read_weights: Callable[[], tuple[Any, Any]]

    @property
    def window_frames(self) -> int:
        """`num_frames` in whole tokens."""
        patch_frames, _ = self.model.patch_shape
        return max(1, self.num_frames // patch_frames) * patch_frames

    def classifier(self) -> Classifier:
        """Returns the flax.nnx module with its weights."""
        graph = classifier_graph(self.model, self.head, len(self.class_names))
        return nnx.merge(graph, *jax.tree.map(jnp.asarray, self.read_weights()))


def check_address(path: str) -> None:
    """Raises CheckpointError for addresses at which there are only encoders."""
    if path.startswith(hub.PREFIX):
        raise checkpoint.CheckpointError(
            f"{path} is on the Hub, from which only encoders are loaded; "
            f"{_HOW_TO_FINETUNE.format(path)}"
        )
    if path.endswith(fairseq.SUFFIXES):
        raise checkpoint.CheckpointError(
            f"{path} is an encoder without classes; {_HOW_TO_FINETUNE.format(path)}"
        )


def read(path: str | os.PathLike) -> Finetuned:
    """Returns the fine-tuned classifier of a run's workdir, or of one checkpoint in it.

    Raises CheckpointError, in one line, where there is none.
    """
    folder = checkpoint.find(path)
    metadata = checkpoint.metadata(folder)
    config = metadata["config"]
    if "mode" not in config:
        raise checkpoint.CheckpointError(
            f"{path} is a pretraining run, without classes; {_HOW_TO_FINETUNE.format(path)}"
        )
    if "class_names" not in metadata:
        raise checkpoint.CheckpointError(
            f"{folder} was saved by an earlier version of this program, which did not keep the "
            "names of its classes: fine-tune again, in another --workdir"
        )
    notes = []
    loss = config["loss"]["name"]
    is_multi_label = metadata.get("is_multi_label")
    if is_multi_label is None:
        is_multi_label = loss == "binary_cross_entropy"
        labels = "several labels" if is_multi_label else "one label"
        notes.append(
            f"an earlier version saved it without the number of labels per clip; {labels}, "
            f"because its loss is {loss}"
        )
    if is_multi_label:
        loss = "binary_cross_entropy"

    @functools.cache
    def weights():
        parts = checkpoint.load_part(folder, "weights")
        return parts["params"], parts["statistics"]

    try:
        defaults = configuration.finetune().to_dict()  # earlier versions lack the newest fields
        model = ModelConfig(**defaults["model"] | config["model"])
        head = HeadConfig(**defaults["head"] | config["head"])
        num_frames = config["num_frames"] or config["max_frames"]
    except (KeyError, TypeError) as error:
        raise checkpoint.CheckpointError(
            f"{folder} was written by another version of this program ({error})"
        ) from None
    if head.layer != "weighted":
        # The checkpoint holds the layers up to the head's only. The last of them is the head's.
        head = dataclasses.replace(head, layer="last")
    return Finetuned(
        path=str(folder),
        class_names=tuple(metadata["class_names"]),
        is_multi_label=is_multi_label,
        loss=loss,
        model=model,
        head=head,
        num_frames=num_frames,
        longest_seconds=metadata.get("longest_seconds"),
        notes=tuple(notes),
        read_weights=weights,
    )
