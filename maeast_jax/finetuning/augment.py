"""Augmentation for fine-tuning: waveform mixup, SpecAugment, noise and roll (SSAST's recipe).

Each function is pure. It draws from the key that it is given, for each example, in float32 at the
global batch shape, and returns its input itself where the configuration asks for nothing. A step
calls them in this order: mixup, filter bank, SpecAugment, normalisation, noise and roll, model.

Names of shapes: B clips, S samples, T frames, F bands, C classes.
"""

import dataclasses

import jax
import jax.numpy as jnp

from maeast_jax import fbank

# SSAST's: the noise's highest value, in normalised energies (their deviation is 0.5), and the
# farthest roll.
NOISE = 0.1
ROLL_FRAMES = 10


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """What is done to training examples: `augment` in config.finetune().

    Attributes:
      mixup: share of the examples that are mixed with another, 0 to 1.
      mixup_alpha: the weight of a mixed example is drawn from Beta(alpha, alpha).
      frequency_mask: bands; one mask per example is narrower than this.
      time_mask: frames of 10 ms; one mask per example is shorter than this.
      noise_and_roll: whether noise is added and the frames are rolled.

    Raises ValueError, in one line, for values out of range.
    """

    mixup: float
    mixup_alpha: float
    frequency_mask: int
    time_mask: int
    noise_and_roll: bool

    def __post_init__(self):
        # Each condition states what must hold, so that nan fails too.
        if not 0.0 <= self.mixup <= 1.0:
            raise ValueError(f"augment.mixup={self.mixup} must be 0 to 1, the share that is mixed")
        if not 0.0 < self.mixup_alpha < float("inf"):
            raise ValueError(f"augment.mixup_alpha={self.mixup_alpha} must be above 0 and finite")
        if not self.time_mask >= 0:
            raise ValueError(f"augment.time_mask={self.time_mask} must not be negative")
        if not 0 <= self.frequency_mask <= fbank.NUM_MEL_BANDS:
            raise ValueError(
                f"augment.frequency_mask={self.frequency_mask} must be 0 to {fbank.NUM_MEL_BANDS}, "
                "the number of bands"
            )


def mixup(
    key: jax.Array,
    waveforms_BxS: jax.Array,
    targets_BxC: jax.Array,
    lengths_B: jax.Array,
    config: AugmentConfig,
) -> tuple[jax.Array, jax.Array]:
    """Mixes a share of the clips with another clip of the batch, and their targets likewise.

    A mixed clip is w a + (1 - w) b with w from Beta(alpha, alpha). It keeps the length of a: b is
    cut, or followed by silence. The means of a and b are removed before mixing and that of the mix
    after, all over true lengths; past its length a mixed clip is 0. Other clips keep every bit.

    This is SSAST's mixup but for the partner: SSAST draws it from the whole set, and here every
    other clip of the batch is equally likely. A clip may be the partner of several.

    Args:
      waveforms_BxS: float32 in [-1, 1], or int16, which is divided by 32,768 as the filter bank
        does.
      targets_BxC: float32, one-hot, several-hot or soft.
      lengths_B: int32, true lengths in samples.

    Returns (float32 [b, S], float32 [b, C]), or the inputs themselves where nothing is mixed.
    """
    num_clips, num_samples = waveforms_BxS.shape
    if config.mixup == 0.0 or num_clips == 1:
        return waveforms_BxS, targets_BxC
    share_key, partner_key, weight_key = jax.random.split(key, 3)
    is_mixed_B = jax.random.uniform(share_key, (num_clips,), jnp.float32) < config.mixup
    step_B = jax.random.randint(partner_key, (num_clips,), 1, num_clips)
    partner_B = (jnp.arange(num_clips) + step_B) % num_clips
    alpha = jnp.float32(config.mixup_alpha)
    weight_Bx1 = jax.random.beta(weight_key, alpha, alpha, (num_clips,), jnp.float32)[:, None]

    is_own_BxS = jnp.arange(num_samples)[None, :] < lengths_B[:, None]
    # The gather moves int16, half of what float32 would be: partners may lie on other devices.
    other_BxS = _centred(
        _to_float32(waveforms_BxS[partner_B]), is_own_BxS[partner_B], lengths_B[partner_B]
    )
    waveforms_BxS = _to_float32(waveforms_BxS)
    own_BxS = _centred(waveforms_BxS, is_own_BxS, lengths_B)
    mixed_BxS = weight_Bx1 * own_BxS + (1.0 - weight_Bx1) * other_BxS
    mixed_BxS = _centred(mixed_BxS, is_own_BxS, lengths_B)
    mixed_BxC = weight_Bx1 * targets_BxC + (1.0 - weight_Bx1) * targets_BxC[partner_B]
    return (
        jnp.where(is_mixed_B[:, None], mixed_BxS, waveforms_BxS),
        jnp.where(is_mixed_B[:, None], mixed_BxC, targets_BxC),
    )


def spec_augment(
    key: jax.Array, fbank_BxTxF: jax.Array, lengths_frames_B: jax.Array, config: AugmentConfig
) -> jax.Array:
    """Returns log energies [b, T, F] with one span of bands and one of frames per example set to 0.

    This is torchaudio's masking, which SSAST uses: the width is uniform in [0, mask) and the start
    in [0, size - width), both rounded down, so that the last place is never masked. The zeros are
    log energies before normalising, as in SSAST. The span of frames lies within the clip's true
    length; SSAST's may lie over padding.
    """
    if config.frequency_mask == 0 and config.time_mask == 0:
        return fbank_BxTxF
    num_clips, num_frames, num_bands = fbank_BxTxF.shape
    band_key, frame_key = jax.random.split(key)
    bands_B = jnp.full((num_clips,), num_bands)
    is_masked_BxF = _span(band_key, bands_B, num_bands, config.frequency_mask)
    is_masked_BxT = _span(frame_key, lengths_frames_B, num_frames, config.time_mask)
    is_masked_BxTxF = is_masked_BxT[:, :, None] | is_masked_BxF[:, None, :]
    return jnp.where(is_masked_BxTxF, jnp.zeros_like(fbank_BxTxF), fbank_BxTxF)


def noise_and_roll(
    key: jax.Array, normalized_BxTxF: jax.Array, lengths_frames_B: jax.Array, config: AugmentConfig
) -> jax.Array:
    """Returns normalised energies [b, T, F] with a little noise, rolled by a few frames (SSAST's).

    The noise is uniform in [0, 1), times a strength per example uniform in [0, NOISE). The roll is
    a whole number of frames, uniform in [-ROLL_FRAMES, ROLL_FRAMES), around the clip's true length:
    frames that leave at one end come back at the other. Rows past the length stay as they are.
    """
    if not config.noise_and_roll:
        return normalized_BxTxF
    num_clips, num_frames, _ = normalized_BxTxF.shape
    noise_key, strength_key, roll_key = jax.random.split(key, 3)
    noise_BxTxF = jax.random.uniform(noise_key, normalized_BxTxF.shape, jnp.float32)
    strength_B = NOISE * jax.random.uniform(strength_key, (num_clips,), jnp.float32)
    noisy_BxTxF = normalized_BxTxF + noise_BxTxF * strength_B[:, None, None]
    roll_B = jax.random.randint(roll_key, (num_clips,), -ROLL_FRAMES, ROLL_FRAMES)
    frame_T = jnp.arange(num_frames)
    source_BxT = (frame_T[None, :] - roll_B[:, None]) % jnp.maximum(lengths_frames_B, 1)[:, None]
    rolled_BxTxF = jnp.take_along_axis(noisy_BxTxF, source_BxT[:, :, None], axis=1)
    is_real_BxT = frame_T[None, :] < lengths_frames_B[:, None]
    return jnp.where(is_real_BxT[:, :, None], rolled_BxTxF, normalized_BxTxF)


def _span(key: jax.Array, sizes_B: jax.Array, num_places: int, widest: int) -> jax.Array:
    """Returns bool [B, places], True in one span per example within its first `sizes_B` places."""
    width_key, start_key = jax.random.split(key)
    sizes_B = sizes_B.astype(jnp.float32)
    width_B = jax.random.uniform(width_key, sizes_B.shape, jnp.float32)
    width_B *= jnp.minimum(sizes_B, jnp.float32(widest))
    start_B = jax.random.uniform(start_key, sizes_B.shape, jnp.float32)
    start_B = jnp.floor(start_B * (sizes_B - width_B))
    stop_B = start_B + jnp.floor(width_B)
    place = jnp.arange(num_places, dtype=jnp.float32)[None, :]
    return (place >= start_B[:, None]) & (place < stop_B[:, None])


def _to_float32(waveforms_BxS: jax.Array) -> jax.Array:
    if waveforms_BxS.dtype == jnp.int16:
        return waveforms_BxS.astype(jnp.float32) / 32_768.0
    return waveforms_BxS.astype(jnp.float32)


def _centred(waveforms_BxS: jax.Array, is_own_BxS: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """Returns clips with their mean removed within their lengths, and 0 past them."""
    own_BxS = jnp.where(is_own_BxS, waveforms_BxS, jnp.zeros_like(waveforms_BxS))
    count_Bx1 = jnp.maximum(lengths_B, 1).astype(jnp.float32)[:, None]
    mean_Bx1 = jnp.sum(own_BxS, axis=1, keepdims=True) / count_Bx1
    return jnp.where(is_own_BxS, own_BxS - mean_Bx1, jnp.zeros_like(own_BxS))
