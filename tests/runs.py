"""Workdirs of runs, made without training."""

import jax
import numpy as np
import tiny

from maeast_jax import checkpoint
from maeast_jax.model import abstract_model, split_model


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
