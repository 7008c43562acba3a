"""Fine-tuned classifiers from any checkpoint that has one."""

import dataclasses
import os

import jax
import jax.numpy as jnp
from flax import nnx

from maeast_jax import checkpoint
from maeast_jax.checkpoint import CheckpointError
from maeast_jax.inference import pretrained
from maeast_jax.inference.pretrained import Pretrained
from maeast_jax.interop import huggingface
from maeast_jax.model import Classifier, classifier_graph
from maeast_jax.runtime import storage

_HOW_TO_FINETUNE = (
    "fine-tune it first: python -m maeast_jax.finetune --config=configs/finetune_folder.py "
    "--config.init_from={} --workdir=NEW (docs/finetuning.md)"
)


@dataclasses.dataclass(frozen=True)
class Finetuned:
    """A fine-tuned classifier.

    Attributes:
      encoder: its encoder, without the layers above the head's.
      head: its head and its classes.
      is_multi_label: whether a clip may have several classes, or none.
      notes: lines for the terminal on what the checkpoint does not say.
    """

    encoder: Pretrained
    head: huggingface.Head
    is_multi_label: bool
    notes: tuple[str, ...]

    def classifier(self) -> Classifier:
        """Returns the flax.nnx module, which computes in the type of its training."""
        config = self.encoder.config
        graph = classifier_graph(config, self.head.config, len(self.head.class_names))
        backbone, statistics = self.encoder.read_weights()
        params = {"backbone": backbone, "head": self.head.params}
        weights = (params, {"backbone": statistics})
        return nnx.merge(graph, *jax.tree.map(jnp.asarray, weights))


def read(path: str | os.PathLike) -> Finetuned:
    """Returns the fine-tuned classifier at `path`, which `pretrained.read` takes too.

    Raises ValueError, in one line, where there is none.
    """
    source = pretrained.read(path)
    if source.read_head is None:
        raise CheckpointError(_without_classes(path, source))
    head = source.read_head()
    is_multi_label, notes = head.is_multi_label, ()
    if is_multi_label is None:
        is_multi_label = head.loss == "binary_cross_entropy"
    if source.is_run and head.is_multi_label is None:
        number = "several labels" if is_multi_label else "one label"
        notes = (
            f"an earlier version saved it without the number of labels per clip; {number}, "
            f"because its loss is {head.loss}",
        )
    return Finetuned(source.encoder_only(), head, is_multi_label, notes)


def _without_classes(path: str | os.PathLike, source: Pretrained) -> str:
    """Returns the message for a checkpoint without the names of its classes."""
    if source.is_run:
        config = checkpoint.metadata(storage.path(source.path))["config"]
        if "mode" in config:
            return (
                f"{source.path} was saved by an earlier version of this program, which did not "
                "keep the names of its classes: fine-tune again, in another --workdir"
            )
        return f"{path} is a pretraining run, without classes; {_HOW_TO_FINETUNE.format(path)}"
    return f"{path} is an encoder without classes; {_HOW_TO_FINETUNE.format(path)}"
