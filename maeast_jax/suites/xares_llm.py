"""XARES-LLM: `python -m xares_llm.run maeast_jax.suites.xares_llm.MaeAstEncoder`.

The model is named by `--model_args '{"checkpoint": "runs/demo"}'`, or by the environment variables
MAEAST_JAX_CHECKPOINT and MAEAST_JAX_LAYER. torch holds the sounds and the embeddings; the model
runs in JAX, on the device of JAX.
"""

import numpy as np

from maeast_jax.suites import sounds

try:
    import torch
except ModuleNotFoundError:
    raise ImportError("the adapter to XARES-LLM needs PyTorch: pip install torch") from None


class MaeAstEncoder(torch.nn.Module):
    """Embeds every time step of sounds of known lengths; `output_dim` is the size of a step.

    Arguments and errors are those of `sounds.step_embedder_of_environment`.
    """

    def __init__(self, checkpoint: str | None = None, layer: int | None = None):
        super().__init__()
        self.embedder = sounds.step_embedder_of_environment(checkpoint, layer)
        self.output_dim = self.embedder.embedding_size
        # XARES-LLM checks only encoders with a parameter, and asks the first for its device.
        self.placeholder = torch.nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(
        self, audio: torch.Tensor, audio_attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns embeddings, float32 [n_sounds, steps, output_dim], and their mask.

        Args:
          audio: float [n_sounds, n_samples] at 16 kHz.
          audio_attention_mask: [n_sounds, n_samples], 1 for the samples of a sound, then 0 for
            padding. None: nothing is padding.

        Returns:
          The embeddings, zero past the end of a sound, and int64 [n_sounds, steps], 1 for the steps
          of a sound and 0 past its end; None instead where the argument is None.

        Raises ValueError for a mask of another shape or order, and as `Embedder` does.
        """
        rows = sounds.from_tensor(audio)
        if audio_attention_mask is None:
            return sounds.to_tensor(np.stack(sounds.embed(rows, self.embedder)), like=audio), None
        lengths = _lengths(audio_attention_mask.detach().cpu().numpy(), rows.shape)
        cut = (row[:length] for row, length in zip(rows, lengths, strict=True))
        embeddings = sounds.embed(cut, self.embedder)
        num_steps = [len(embedding) for embedding in embeddings]
        padded = np.zeros((len(rows), max(num_steps), self.output_dim), np.float32)
        for row, embedding in zip(padded, embeddings, strict=True):
            row[: len(embedding)] = embedding
        mask = np.arange(max(num_steps)) < np.array(num_steps)[:, None]
        return (
            sounds.to_tensor(padded, like=audio),
            sounds.to_tensor(mask.astype(np.int64), like=audio),
        )


def _lengths(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    lengths = np.sum(mask != 0, axis=-1)
    if mask.shape != shape or not np.array_equal(mask != 0, np.arange(shape[1]) < lengths[:, None]):
        raise ValueError(
            f"audio_attention_mask {list(mask.shape)} must have the shape of audio {list(shape)},"
            " and in each row ones, then zeros; pad sounds at their ends"
        )
    return lengths
