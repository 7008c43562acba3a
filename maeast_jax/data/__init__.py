"""Data sets: written, read, and drawn from in batches. Nothing here imports jax."""

from maeast_jax.data.audio import (
    AUDIO_SUFFIXES,
    SAMPLE_RATE_HZ,
    DecodePool,
    Recording,
    has_sound,
    num_cores,
)
from maeast_jax.data.dataset import prepare_tensorflow
from maeast_jax.data.files import Outcome
from maeast_jax.data.labelled import Labelled
from maeast_jax.data.pipeline import Batch, DataConfig
from maeast_jax.data.writer import DataError, Example

__all__ = [
    "AUDIO_SUFFIXES",
    "SAMPLE_RATE_HZ",
    "Batch",
    "DataConfig",
    "DataError",
    "DecodePool",
    "Example",
    "Labelled",
    "Outcome",
    "Recording",
    "has_sound",
    "num_cores",
    "prepare_tensorflow",
]
