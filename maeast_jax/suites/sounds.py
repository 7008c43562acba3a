"""Sounds as the suites hand them over, and embeddings as they take them back."""

import os
from collections.abc import Iterable

import numpy as np

from maeast_jax import fbank
from maeast_jax.inference import Embedder, load
from maeast_jax.model import SpectrogramEncoder

CHECKPOINT_VARIABLE = "MAEAST_JAX_CHECKPOINT"
LAYER_VARIABLE = "MAEAST_JAX_LAYER"


def scene_embedder(model: SpectrogramEncoder, pool: str, layer: int | str) -> Embedder:
    """Returns an embedder with one embedding [size] per sound.

    Raises ValueError, in one line, for a pool or a layer with several, and as `Embedder` does.
    """
    embedder = Embedder(model, pool=pool, layer=layer)
    _check_axes(embedder, ("size",), "pool 'time', 'mean' or 'moments' and one layer")
    return embedder


def step_embedder(model: SpectrogramEncoder, layer: int | str) -> Embedder:
    """Returns an embedder of every time step, [steps, size] per sound. Errors as above."""
    embedder = Embedder(model, pool="none", layer=layer)
    _check_axes(embedder, ("steps", "size"), "one layer")
    return embedder


def _check_axes(embedder: Embedder, expected: tuple[str, ...], remedy: str) -> None:
    if embedder.axes != expected:
        raise ValueError(
            f"pool={embedder.pool!r} of layer={embedder.layer!r} gives {list(embedder.axes)} per"
            f" sound, and the suite takes {list(expected)}; choose {remedy}"
        )


def step_embedder_of_environment(
    checkpoint: str | os.PathLike | None = None, layer: int | str | None = None
) -> Embedder:
    """Returns `step_embedder` for suites that build encoders without arguments.

    Args:
      checkpoint: as `load` takes it. None: the environment variable MAEAST_JAX_CHECKPOINT.
      layer: from 0, or from -1 backwards. None: MAEAST_JAX_LAYER, or the last layer.

    Raises:
      ValueError: neither names a checkpoint, there is none at that path, or the model lacks the
        layer.
      OSError: the checkpoint cannot be read.
    """
    checkpoint = checkpoint or os.environ.get(CHECKPOINT_VARIABLE)
    if not checkpoint:
        raise ValueError(
            f"{CHECKPOINT_VARIABLE} is not set; name a checkpoint:"
            f" export {CHECKPOINT_VARIABLE}=runs/demo"
        )
    if layer is None:
        layer = os.environ.get(LAYER_VARIABLE, -1)
    return step_embedder(load(checkpoint), layer)


def from_tensor(audio) -> np.ndarray:
    """Returns a float tensor [n_sounds, n_samples] as float32; ValueError for other tensors."""
    if audio.ndim != 2 or not audio.is_floating_point():
        raise ValueError(
            f"audio is {audio.dtype} {list(audio.shape)}; expected float [n_sounds, n_samples]"
        )
    return audio.detach().cpu().float().numpy()


def embed(sounds: Iterable[np.ndarray], embedder: Embedder) -> list[np.ndarray]:
    """Returns the embedding of each sound [samples]; zeros complete a sound shorter than a frame.

    Raises ValueError as `Embedder` does.
    """
    return list(embedder(_at_least_a_frame(sound) for sound in sounds))


def _at_least_a_frame(sound: np.ndarray) -> np.ndarray:
    missing = max(0, fbank.FRAME_LENGTH - len(sound))
    return np.pad(sound, (0, missing)) if missing else sound


def to_tensor(array: np.ndarray, like):
    """Returns the array as a tensor on the device of the tensor `like`."""
    import torch

    return torch.from_numpy(array).to(like.device)
