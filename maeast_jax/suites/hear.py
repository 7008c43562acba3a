"""The HEAR 2021 common API.

`python -m hearvalidator.validate maeast_jax.suites.hear -m CKPT -d cpu` checks a checkpoint with
it. Sounds and embeddings are torch tensors, and torch does nothing else here: the model runs in
JAX, on the device of JAX.
"""

import os

import numpy as np

from maeast_jax import fbank
from maeast_jax.inference import Embedder, load
from maeast_jax.suites import sounds


def load_model(
    model_file_path: str | os.PathLike = "",
    *,
    layer: int = -1,
    scene_pool: str = "time",
    dtype: str = "float32",
):
    """Returns a torch.nn.Module without parameters, for the two functions below.

    It has `sample_rate` (Hz), `scene_embedding_size` and `timestamp_embedding_size`.

    Args:
      model_file_path: a run's workdir, one checkpoint in it, or a file in the authors' layout.
      layer: the encoder's layer that embeddings come from, from 0 or from -1 backwards.
      scene_pool: the pool of scene embeddings, as `Embedder` takes it: "time", "mean" or "moments".
      dtype: the type of the computation, float32 or bfloat16.

    Raises:
      ValueError: there is no path (no checkpoint is built in) or no checkpoint at it, or values do
        not fit the model.
      OSError: the checkpoint cannot be read.
    """
    import torch

    if not os.fspath(model_file_path):
        raise ValueError("no checkpoint is built in; name one: load_model(PATH), --model=PATH")
    encoder = load(model_file_path, dtype)
    model = torch.nn.Module()  # HEAR asks for a module of torch or TensorFlow
    model.sample_rate = fbank.SAMPLE_RATE_HZ
    model.scene = sounds.scene_embedder(encoder, scene_pool, layer)
    model.timestamp = sounds.step_embedder(encoder, layer)
    model.scene_embedding_size = model.scene.embedding_size
    model.timestamp_embedding_size = model.timestamp.embedding_size
    return model


def get_timestamp_embeddings(audio, model):
    """Returns embeddings of every time step of sounds of one length, and the times of the steps.

    Args:
      audio: float tensor [n_sounds, n_samples], in [-1, 1] at `model.sample_rate`. Sounds shorter
        than one step are padded with zeros.
      model: from `load_model`.

    Returns:
      (embeddings, timestamps), float32 tensors on the device of `audio`: [n_sounds, steps,
      timestamp_embedding_size], the bands of a step side by side, and [n_sounds, steps], the middle
      of each step in milliseconds. A last part shorter than a step has no embedding.

    Raises ValueError for another shape, type or values, as `Embedder` does.
    """
    embeddings = _embed(audio, model.timestamp)
    step_ms = 1000 * model.timestamp.step_seconds
    # The frames of a step start one shift apart, and the last frame is longer than the shift.
    overhang_ms = 1000 * (fbank.FRAME_LENGTH - fbank.FRAME_SHIFT) / fbank.SAMPLE_RATE_HZ
    middles_ms = step_ms * np.arange(embeddings.shape[1]) + (step_ms + overhang_ms) / 2
    timestamps = sounds.to_tensor(np.float32(middles_ms), like=audio)
    return embeddings, timestamps.repeat(len(audio), 1)


def get_scene_embeddings(audio, model):
    """Returns one embedding per sound, a float32 tensor [n_sounds, scene_embedding_size].

    Arguments and errors are those of `get_timestamp_embeddings`.
    """
    return _embed(audio, model.scene)


def _embed(audio, embedder: Embedder):
    embeddings = sounds.embed(sounds.from_tensor(audio), embedder)
    return sounds.to_tensor(np.stack(embeddings), like=audio)
