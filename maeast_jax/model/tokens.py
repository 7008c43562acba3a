"""Spectrograms as normalised sequences of tokens: input norm, patches, padding and positions.

Tokens do not overlap. They are numbered time-major with frequency fastest.

Names of shapes: B clips, T frames, F bands, N tokens, P values per token, D width.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from maeast_jax import fbank

# (frames, mel bands) per token; both hold 256 values (paper, section 2.1).
PATCH_SHAPES = {"patch": (16, 16), "frame": (2, 128)}

BATCH_NORM_MOMENTUM = 0.1
BATCH_NORM_EPSILON = 1e-5
# AST's input scale: mean 0, deviation 0.5.
INPUT_SCALE = 0.5


def patch_shape(tokens: str) -> tuple[int, int]:
    """(frames, bands) per token for "patch", "frame" or "FRAMESxBANDS" such as "8x32".

    Raises ValueError for another name, and for bands that do not divide the 128 mel bands.
    """
    if tokens in PATCH_SHAPES:
        return PATCH_SHAPES[tokens]
    found = re.fullmatch("([1-9][0-9]*)x([1-9][0-9]*)", tokens)
    if not found or fbank.NUM_MEL_BANDS % int(found[2]):
        raise ValueError(
            f"model.tokens={tokens!r} is unknown; known: {', '.join(PATCH_SHAPES)}, FRAMESxBANDS "
            f"like 8x32, with bands that divide the {fbank.NUM_MEL_BANDS}"
        )
    return int(found[1]), int(found[2])


def patchify(fbank_BxTxF: jax.Array, patch_shape: tuple[int, int]) -> jax.Array:
    """[b, T, F] to tokens [b, N, frames * bands], with frequency fastest inside a token too.

    The order is that of torch's Unfold over [b, 1, T, F] with kernel (time, frequency), which the
    authors use. As there, frames past the last whole patch are dropped.
    """
    num_clips, num_frames, num_bands = fbank_BxTxF.shape
    patch_frames, patch_bands = patch_shape
    time_tokens, band_tokens = num_frames // patch_frames, num_bands // patch_bands
    whole = fbank_BxTxF[:, : time_tokens * patch_frames]
    blocks = whole.reshape(num_clips, time_tokens, patch_frames, band_tokens, patch_bands)
    return blocks.transpose(0, 1, 3, 2, 4).reshape(
        num_clips, time_tokens * band_tokens, patch_frames * patch_bands
    )


def unpatchify(patches_BxNxP: jax.Array, patch_shape: tuple[int, int], num_bands: int) -> jax.Array:
    """The inverse of `patchify`: [b, N, frames * bands] to [b, T, F]."""
    num_clips, num_tokens, _ = patches_BxNxP.shape
    patch_frames, patch_bands = patch_shape
    band_tokens = num_bands // patch_bands
    time_tokens = num_tokens // band_tokens
    blocks = patches_BxNxP.reshape(num_clips, time_tokens, band_tokens, patch_frames, patch_bands)
    return blocks.transpose(0, 1, 3, 2, 4).reshape(num_clips, time_tokens * patch_frames, num_bands)


def zero_padding(fbank_BxTxF: jax.Array, lengths_frames_B: jax.Array) -> jax.Array:
    """Log energies [b, T, F] with zeros past each clip's length, as the authors fill patches up."""
    is_real_BxT = jnp.arange(fbank_BxTxF.shape[1]) < lengths_frames_B[:, None]
    return jnp.where(is_real_BxT[..., None], fbank_BxTxF, jnp.zeros_like(fbank_BxTxF))


def token_padding(
    lengths_frames_B: jax.Array, num_tokens: int, patch_shape: tuple[int, int], band_tokens: int
) -> jax.Array:
    """bool [b, N], True where a token lies wholly past its clip's last frame.

    A token that holds one real frame is not padding (the authors' forward_padding_mask).
    """
    real_time_tokens_B = (lengths_frames_B + (patch_shape[0] - 1)) // patch_shape[0]
    return jnp.arange(num_tokens)[None, :] >= (real_time_tokens_B * band_tokens)[:, None]


def sinusoid(num_tokens: int, width: int) -> np.ndarray:
    """The fixed position table, float32 [N, D]: sines in even columns, cosines in odd ones.

    The angles are rounded to float32 before the sine, as in the authors' torch code, so that the
    table is theirs at position 1,000 too.
    """
    positions_Nx1 = np.arange(num_tokens, dtype=np.float32)[:, None]
    even_H = np.arange(0, width, 2, dtype=np.float32)
    angles_NxH = positions_Nx1 * np.exp(even_H * np.float32(-np.log(10_000.0) / width))
    return np.stack([np.sin(angles_NxH), np.cos(angles_NxH)], axis=-1).reshape(num_tokens, width)


class InputNorm(nnx.Module):
    """Batch norm over all frames and bands of the batch, without affine parameters, times 0.5.

    As in torch, training normalises by the statistics of the batch and moves the running ones a
    tenth of the way to them, with the unbiased variance. Evaluation normalises by the running ones.
    """

    def __init__(self):
        self.mean = nnx.BatchStat(jnp.zeros((), jnp.float32))
        self.variance = nnx.BatchStat(jnp.ones((), jnp.float32))
        self.num_batches = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __call__(self, fbank_BxTxF: jax.Array, training: bool) -> jax.Array:
        """Normalised log energies [b, T, F]."""
        mean, variance = self.mean[...], self.variance[...]
        if training:
            mean, variance = _moments(fbank_BxTxF)
            unbiased = variance * (fbank_BxTxF.size / (fbank_BxTxF.size - 1))
            self.mean[...] += BATCH_NORM_MOMENTUM * (mean - self.mean[...])
            self.variance[...] += BATCH_NORM_MOMENTUM * (unbiased - self.variance[...])
            self.num_batches[...] += 1
        return (fbank_BxTxF - mean) * (INPUT_SCALE * jax.lax.rsqrt(variance + BATCH_NORM_EPSILON))

    def calibrate(self, fbank_BxTxF: jax.Array) -> None:
        """Sets the running statistics to those of a batch."""
        self.mean[...], self.variance[...] = _moments(fbank_BxTxF)

    def set_statistics(self, mean: float, deviation: float) -> None:
        """Makes the normalisation (x - mean) / (2 deviation), as SSAST does with a data set's own.

        Raises ValueError for a deviation that is not above 0.
        """
        if not 0.0 < deviation < float("inf"):
            raise ValueError(f"an input deviation of {deviation} must be above 0 and finite")
        self.mean[...] = jnp.float32(mean)
        # Calling the module adds the epsilon again.
        self.variance[...] = jnp.float32(deviation**2 - BATCH_NORM_EPSILON)

    def undo(self, normalized: jax.Array) -> jax.Array:
        """Normalised values back to log energies, by the running statistics."""
        deviation = jnp.sqrt(self.variance[...] + BATCH_NORM_EPSILON)
        return normalized / INPUT_SCALE * deviation + self.mean[...]


def _moments(fbank_BxTxF: jax.Array) -> tuple[jax.Array, jax.Array]:
    mean = jnp.mean(fbank_BxTxF)
    return mean, jnp.mean(jnp.square(fbank_BxTxF - mean))
