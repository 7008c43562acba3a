"""X-ARES: `python -m xares.run maeast_jax/suites/xares.py TASK.py ...`.

X-ARES builds the encoder without arguments, in processes that it starts: the environment variables
MAEAST_JAX_CHECKPOINT and MAEAST_JAX_LAYER (the last, if it is not set) name the model. It takes the
only name of this module that ends in "Encoder", so nothing else here may be called so. torch holds
the sounds and the embeddings; the model runs in JAX, on the device of JAX.
"""

import numpy as np

from maeast_jax import fbank
from maeast_jax.suites import sounds

try:
    import torch
except ModuleNotFoundError:
    raise ImportError("the adapter to X-ARES needs PyTorch: pip install xares") from None


class MaeAstEncoder(torch.nn.Module):
    """Embeds every time step; it has `sampling_rate` (Hz), `output_dim` and `hop_size_in_ms`.

    X-ARES pads the sounds of a batch with zeros and does not tell their lengths, so nothing tells
    digital silence at the end of a sound from padding. All zeros at the end of a row are taken for
    padding: the model does not see them, and steps that lie in them hold the mean of the row's
    other steps. So neither a step of a sound nor the mean over all steps, which is what X-ARES
    classifies, depends on the other rows. A row of zeros counts as a sound of one step.

    Raises ValueError and OSError as `sounds.step_embedder_of_environment`.
    """

    def __init__(self):
        super().__init__()
        self.embedder = sounds.step_embedder_of_environment()
        self.sampling_rate = fbank.SAMPLE_RATE_HZ
        self.output_dim = self.embedder.embedding_size
        self.hop_size_in_ms = 1000 * self.embedder.step_seconds

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        """Returns float32 [n_sounds, steps, output_dim] of float [n_sounds, n_samples] at 16 kHz.

        Audio [n_samples] is one sound. A last part shorter than a step has no embedding. Raises
        ValueError for another shape, type or values, as `Embedder` does.
        """
        rows = sounds.from_tensor(audio[None] if audio.ndim == 1 else audio)
        embeddings = sounds.embed(map(_without_padding, rows), self.embedder)
        num_steps = self.embedder.num_steps(max(fbank.FRAME_LENGTH, rows.shape[1]))
        filled = [_filled(embedding, num_steps) for embedding in embeddings]
        return sounds.to_tensor(np.stack(filled), like=audio)


def _without_padding(row: np.ndarray) -> np.ndarray:
    return row[: np.flatnonzero(row).max(initial=-1) + 1]


def _filled(embedding: np.ndarray, num_steps: int) -> np.ndarray:
    mean = embedding.mean(axis=0, keepdims=True)
    return np.concatenate([embedding, np.repeat(mean, num_steps - len(embedding), axis=0)])
