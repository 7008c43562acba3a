"""Workdirs of runs, made without training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from flax import nnx

from maeast_jax import checkpoint
from maeast_jax import config as configuration
from maeast_jax.model import (
    Classifier,
    HeadConfig,
    abstract_model,
    backbone_config,
    split_model,
)


def write(workdir, seed=0, **model_fields):
    """Makes a workdir with one checkpoint, of step 0 and random weights; returns `workdir`.

    The configuration is that of `tiny` with other fields of its section `model`.
    """
    config = tiny.get_config()
    config.model.update(model_fields)
    random = np.random.default_rng(seed)
    _, params, statistics = split_model(abstract_model(tiny.model_config(**config.model)))
    params = jax.tree.map(lambda leaf: np.float32(0.3 * random.normal(size=leaf.shape)), params)
    statistics = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), statistics)
    # Statistics of log energies, as training would find them.
    statistics["input_norm"] |= {
        "mean": np.asarray(-6.5, np.float32),
        "variance": np.asarray(17, np.float32),
    }
    weights = {"params": params, "statistics": statistics}
    checkpoint.write_parts(workdir, {"weights": weights}, {"config": config.to_dict()})
    return workdir


def write_classifier(workdir, names, seed=0, loss="cross_entropy", head=None, **changes):
    """Makes the workdir of a fine-tuned run, with random weights, and returns the classifier.

    Args:
      head: fields of the section `head`.
      changes: other keys of the metadata; None leaves a key out.
    """
    config = configuration.finetune()
    config.loss.name, config.max_frames = loss, 64
    config.head.update(head or {})
    config.model = tiny.get_config().model
    settings = config.to_dict()
    model, head = tiny.model_config(**settings["model"]), HeadConfig(**settings["head"])
    classifier = Classifier(model, head, len(names), nnx.Rngs(seed))
    classifier.backbone.input_norm.set_statistics(-6.5, 4.0)
    random = np.random.default_rng(seed)
    # Larger than at the start of training, so that clips of different sounds differ.
    output = classifier.head.output.kernel
    output[...] = jnp.asarray(random.normal(0, 0.3, output.shape), jnp.float32)
    _, params, statistics = split_model(classifier)
    settings["model"] = dataclasses.asdict(backbone_config(model, head))
    metadata = {"config": settings, "class_names": list(names), "is_multi_label": False}
    metadata = {key: value for key, value in (metadata | changes).items() if value is not None}
    weights = {"params": params, "statistics": statistics}
    checkpoint.write_parts(workdir, {"weights": weights}, metadata)
    return classifier
