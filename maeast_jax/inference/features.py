"""One vector per clip: the features that probes are fitted on."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

from maeast_jax import config as configuration
from maeast_jax import fbank
from maeast_jax.data import pipeline
from maeast_jax.inference.embedder import Embedder
from maeast_jax.inference.pretrained import Pretrained
from maeast_jax.model import MaeAst, ModelConfig, stream_key

Extractor = Callable[[Iterable[np.ndarray]], Iterator[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class EncoderFeatures:
    """Everything that the features of a clip depend on, beside the clip.

    Attributes:
      checkpoint: path of the encoder; "" for an encoder at its initial values.
      stamp: the checkpoint's `Pretrained.stamp`.
      seed: draws the initial values; 0 with a checkpoint.
      model: the encoder and its compute type.
      normalize: (mean, deviation) of log energies; None for the checkpoint's.
      pool, layer, phases, window_frames: arguments of `Embedder`.
    """

    checkpoint: str
    stamp: str
    seed: int
    model: ModelConfig
    normalize: tuple[float, float] | None
    pool: str
    layer: int
    phases: int
    window_frames: int

    @classmethod
    def of(cls, saved: dict[str, Any]) -> "EncoderFeatures":
        """Returns the features that `dataclasses.asdict` turned into JSON."""
        normalize = saved["normalize"] and tuple(saved["normalize"])
        defaults = configuration.pretrain().model.to_dict()  # earlier versions lack the newest
        model = ModelConfig(**defaults | saved["model"])
        return cls(**saved | {"model": model, "normalize": normalize})

    def extractor(self, source: Pretrained | None, batch_tokens: int | None = None) -> Embedder:
        """Returns what maps clips to features.

        `source` is the checkpoint, which the caller has read; None without one.
        """
        if source is not None:
            model = source.encoder_only().model(self.model.dtype)
        else:
            key = stream_key(self.seed, np.int32(0), "params")
            model = MaeAst(self.model, nnx.Rngs(params=key))
        if self.normalize is not None:
            model.input_norm.set_statistics(*self.normalize)
        return Embedder(
            model,
            pool=self.pool,
            phases=self.phases,
            layer=self.layer,
            window_frames=self.window_frames,
            batch_tokens=batch_tokens,
        )


def fbank_moments(clips: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yields mean and deviation over time of each mel band, [256], for each clip."""
    for samples in clips:
        energies = log_energies(samples)
        yield np.concatenate([energies.mean(axis=0), energies.std(axis=0)])


def log_energies(samples: np.ndarray) -> np.ndarray:
    """Returns float32 [frames, bands] of a clip, int16 or float32 [samples], at least 400.

    The clip is padded to one of few lengths so that little is compiled.
    """
    num_frames = fbank.num_frames(len(samples))
    padded = np.zeros(fbank.num_samples(pipeline.bucket_steps(num_frames, 1024)), samples.dtype)
    padded[: min(len(samples), len(padded))] = samples[: len(padded)]
    return np.asarray(_jitted_fbank(padded))[:num_frames]


_jitted_fbank = jax.jit(fbank.fbank)
