"""Spectrograms as sequences of tokens, without overlap, time-major with frequency fastest."""

import jax
import jax.numpy as jnp
import numpy as np

# Frames x mel bands a token; both hold 256 values (paper, section 2.1).
PATCH_SHAPES = {"patch": (16, 16), "frame": (2, 128)}


def patch_shape(tokens: str, num_bands: int) -> tuple[int, int]:
    """(frames, bands) a token, of "patch", "frame" or any "FRAMESxBANDS" such as "8x32".

    Raises ValueError for another name, and for bands that do not divide `num_bands`.
    """
    if tokens in PATCH_SHAPES:
        return PATCH_SHAPES[tokens]
    frames, separator, bands = tokens.partition("x")
    if not (separator and frames.isdecimal() and bands.isdecimal() and int(frames) and int(bands)):
        known = ", ".join(PATCH_SHAPES)
        raise ValueError(f"tokens={tokens!r} is unknown; known: {known}, FRAMESxBANDS like 8x32")
    if num_bands % int(bands):
        raise ValueError(f"tokens={tokens!r}: {bands} bands must divide the {num_bands} there are")
    return int(frames), int(bands)


def grid_shape(num_frames: int, num_bands: int, patch_shape: tuple[int, int]) -> tuple[int, int]:
    """(tokens along time, tokens along frequency) of a spectrogram; a partial patch is dropped."""
    return num_frames // patch_shape[0], num_bands // patch_shape[1]


def patchify(fbank_BxTxF: jax.Array, patch_shape: tuple[int, int]) -> jax.Array:
    """[b, T, F] to tokens [b, N, frames * bands], within a token frequency fastest.

    The order is that of torch's Unfold over [b, 1, T, F] with kernel (time, frequency), which the
    authors use; frames past the last whole patch are dropped, as there.
    """
    num_clips, num_frames, num_bands = fbank_BxTxF.shape
    patch_frames, patch_bands = patch_shape
    time_tokens, band_tokens = grid_shape(num_frames, num_bands, patch_shape)
    whole = fbank_BxTxF[:, : time_tokens * patch_frames, : band_tokens * patch_bands]
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


def token_padding(
    lengths_frames_B: jax.Array, num_tokens: int, patch_shape: tuple[int, int], band_tokens: int
) -> jax.Array:
    """bool [b, N], True where a token lies wholly past its clip's last frame.

    A token that holds one real frame is not padding (the authors' forward_padding_mask).
    """
    real_time_tokens_B = (lengths_frames_B + (patch_shape[0] - 1)) // patch_shape[0]
    return jnp.arange(num_tokens)[None, :] >= (real_time_tokens_B * band_tokens)[:, None]


def sinusoid(num_tokens: int, width: int) -> np.ndarray:
    """Fixed 1-D position table, float32 [N, D]: sines at even, cosines at odd places.

    Rounded to float32 where the authors' torch code rounds: before the sine, so that the table
    stays theirs at position 1,000 too.
    """
    positions_Nx1 = np.arange(num_tokens, dtype=np.float32)[:, None]
    rates_H = np.exp(
        np.arange(0, width, 2, dtype=np.float32) * np.float32(-np.log(10_000.0) / width)
    )
    angles_NxH = positions_Nx1 * rates_H
    return np.stack([np.sin(angles_NxH), np.cos(angles_NxH)], axis=-1).reshape(num_tokens, width)
