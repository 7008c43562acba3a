"""Workdirs of runs, made without training."""

import jax
import numpy as np
import tiny

from maeast_jax import checkpoint
from maeast_jax import config as configuration
from maeast_jax.model import abstract_classifier, abstract_model, backbone_config, split_model


def write(workdir, seed=0, **model_fields):
    """Makes a workdir with one checkpoint, of step 0 and random weights; returns `workdir`.

    The configuration is that of `tiny` with other fields of its section `model`.
    """
    config = tiny.get_config()
    config.model.update(model_fields)
    weights = _weights(abstract_model(tiny.model_config(**config.model)), seed)
    checkpoint.write_parts(workdir, {"weights": weights}, {"config": config.to_dict()})
    return workdir


def write_classifier(workdir, class_names, loss="cross_entropy", head=(), **model_fields):
    """Makes the workdir of a fine-tuned classifier with random weights; returns `workdir`.

    head: changes of the section `head` of the default configuration.
    """
    config = configuration.finetune()
    config.model.update(tiny.get_config().model)
    config.model.update(model_fields)
    config.head.update(dict(head))
    model, head = tiny.model_config(**config.model), tiny.head_config(**config.head)
    weights = _weights(abstract_classifier(model, head, len(class_names)))
    config.model.update(vars(backbone_config(model, head)))
    config.loss.name = loss
    metadata = {"config": config.to_dict(), "class_names": class_names, "is_multi_label": False}
    checkpoint.write_parts(workdir, {"weights": weights}, metadata)
    return workdir


def _weights(model, seed=0):
    """Returns random parameters and the statistics of log energies, as training would find them."""
    random = np.random.default_rng(seed)
    _, params, statistics = split_model(model)
    params = jax.tree.map(lambda leaf: np.float32(0.3 * random.normal(size=leaf.shape)), params)
    statistics = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), statistics)
    statistics.get("backbone", statistics)["input_norm"] |= {
        "mean": np.asarray(-6.5, np.float32),
        "variance": np.asarray(17, np.float32),
    }
    return {"params": params, "statistics": statistics}
