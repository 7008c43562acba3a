"""perch-hoplite: an `EmbeddingModel` for its databases of embeddings."""

import dataclasses

import numpy as np

from maeast_jax import fbank
from maeast_jax.inference import load
from maeast_jax.suites import sounds

try:
    from perch_hoplite.zoo import zoo_interface
except ModuleNotFoundError as error:
    raise ImportError(
        f"the adapter to perch-hoplite needs {error.name}: pip install --no-deps perch-hoplite"
    ) from None


@dataclasses.dataclass
class MaeAst(zoo_interface.EmbeddingModel):
    """One embedding per window, which depends on that window alone.

    Args:
      sample_rate: 16,000 Hz, the only rate of the model; hoplite resamples to it.
      checkpoint: a run's workdir, one checkpoint in it, or a file in the authors' layout.
      window_size_s, hop_size_s: seconds of a window, and from one window to the next.
      pool: as `Embedder` takes it: "time", "mean" or "moments".
      layer: from 0, or from -1 backwards.
      dtype: the type of the computation, float32 or bfloat16.

    Raises:
      ValueError: values do not fit the model, or there is no checkpoint at the path.
      OSError: the checkpoint cannot be read.
    """

    sample_rate: int = fbank.SAMPLE_RATE_HZ
    checkpoint: str = ""
    window_size_s: float = 5.0
    hop_size_s: float = 5.0
    pool: str = "time"
    layer: int = -1
    dtype: str = "float32"

    def __post_init__(self):
        if self.sample_rate != fbank.SAMPLE_RATE_HZ:
            raise ValueError(
                f"sample_rate={self.sample_rate} must be {fbank.SAMPLE_RATE_HZ}; set it so, and"
                " hoplite resamples the recordings"
            )
        if not self.checkpoint:
            raise ValueError("checkpoint='' names no model; give a path, such as runs/demo")
        least_s = fbank.FRAME_LENGTH / fbank.SAMPLE_RATE_HZ
        if min(self.window_size_s, self.hop_size_s) < least_s:
            raise ValueError(
                f"window_size_s={self.window_size_s} and hop_size_s={self.hop_size_s} must be at"
                f" least {least_s}, a frame of the filter bank"
            )
        model = load(self.checkpoint, self.dtype)
        self._embedder = sounds.scene_embedder(model, self.pool, self.layer)
        self.embedding_size = self._embedder.embedding_size

    @classmethod
    def from_config(cls, model_config) -> "MaeAst":
        """Returns the model of a ConfigDict whose fields are the arguments above."""
        return cls(**model_config)

    def embed(self, audio_array: np.ndarray) -> zoo_interface.InferenceOutputs:
        """Returns embeddings [windows, 1, size] of audio [samples] at 16 kHz.

        Windows start every hop, as hoplite's own models cut them: a last part shorter than a window
        is left out. Audio shorter than a window is embedded as it is. Raises ValueError for another
        shape, type or values, as `Embedder` does.
        """
        embeddings = np.stack(sounds.embed(self._windows(audio_array), self._embedder))
        return zoo_interface.InferenceOutputs(embeddings=embeddings[:, None])

    def batch_embed(self, audio_batch: np.ndarray) -> zoo_interface.InferenceOutputs:
        """Returns embeddings [n_sounds, windows, 1, size] of audio [n_sounds, samples]."""
        return zoo_interface.batch_embed_from_embed_fn(self.embed, audio_batch)

    def _windows(self, audio: np.ndarray) -> np.ndarray:
        if len(audio) <= int(self.window_size_s * self.sample_rate):
            return audio[None]
        return self.frame_audio(audio, self.window_size_s, self.hop_size_s)
