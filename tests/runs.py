"""Workdirs of runs, made without training."""

import jax.numpy as jnp
import tiny
from flax import nnx

from maeast_jax import checkpoint
from maeast_jax.model import MaeAst, split_model


def write(workdir, seed=0, **model_fields):
    """Makes a workdir with one checkpoint, of step 0 and random weights; returns `workdir`.

    The configuration is that of `tiny` with other fields of its section `model`.
    """
    config = tiny.get_config()
    config.model.update(model_fields)
    model = MaeAst(tiny.model_config(**config.model), nnx.Rngs(seed))
    _, params, statistics = split_model(model)
    # Statistics of log energies, as training would find them.
    statistics["input_norm"] |= {"mean": jnp.float32(-6.5), "variance": jnp.float32(17)}
    weights = {"params": params, "statistics": statistics}
    checkpoint.write_parts(workdir, {"weights": weights}, {"config": config.to_dict()})
    return workdir
