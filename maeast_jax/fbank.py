"""Kaldi's log-mel filter bank: matrix products on the device, a fast transform in tf.data.

Mean removal, pre-emphasis, window and Fourier transform of a frame are linear. So on the device
they are one matrix, built once in float64, from the 400 samples of a frame to the 256 complex bins
that the mel bands use. A host computes them step by step in float64, which devices lack or compute
slowly. The results are those of Kaldi's `compute-fbank-feats` without energy and dither, which the
authors of MAE-AST reach through torchaudio's `compliance.kaldi.fbank`.

jax and TensorFlow are imported inside the functions that compute with them: processes that decode
audio or read data sets need only the numbers of frames and samples.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import jax
    import tensorflow as tf

SAMPLE_RATE_HZ = 16_000
FULL_SCALE = 32_768  # of int16; soundfile and FFmpeg divide by it, so 16-bit files stay exact
FRAME_LENGTH = 400  # samples: 25 ms
FRAME_SHIFT = 160  # samples: 10 ms
NUM_MEL_BANDS = 128
LOWEST_HZ = 20.0  # lower edge of band 0

# Kaldi's default window, "povey": a symmetric Hann window to this power.
_WINDOW = np.hanning(FRAME_LENGTH) ** 0.85
# A frame is padded with zeros to this power of two (Kaldi's round_to_power_of_two).
_FFT_LENGTH = 512
_NUM_BINS = _FFT_LENGTH // 2  # Kaldi's mel bands leave out the bin at the Nyquist frequency
_PRE_EMPHASIS = 0.97
_HOP = math.gcd(FRAME_LENGTH, FRAME_SHIFT)  # samples; divides a frame's length and shift
_ENERGY_FLOOR = np.finfo(np.float32).eps
# Floats that pass full scale this many times are not audio but integers stored as floats.
_LOUDEST = 100.0

# The coarse parts of samples and matrix (see `_Constants`) have this many bits after the binary
# point. Their products then have 18, and float32 adds them up to sums of 2**(24 - 18) = 64 without
# rounding.
_COARSE_BITS = 9

# A host transforms this many frames at a time, 1.6 MB in float64. Smaller blocks pay more overhead
# per operation, larger blocks leave the cache.
_BLOCK_FRAMES = 512
# A host multiplies each group of bands only with the bins that it holds.
_BAND_GROUPS = (slice(0, 64), slice(64, 96), slice(96, 128))


class _Constants(NamedTuple):
    """Matrices of the filter bank, float32. `full`, `coarse` and `fine` go from the samples of a
    frame to the real parts and then the imaginary parts of its bins.

    Beside a pure tone most bands hold little more than the energy floor, and there the rounding of
    a single float32 product changes a log energy by 1e-3 to 3e-3, more for some orders of
    summation. So samples x and matrix D are split into a coarse and a fine part each:
    x D = xc Dc + (xc Df + xf D). The first product is exact; the others, and their rounding, are
    2**-10 as large. The remaining error is 5e-5.
    """

    full: np.ndarray  # [400, 512]
    coarse: np.ndarray  # [400, 512]: `full` rounded to multiples of 2**-9
    fine: np.ndarray  # [400, 512]: `full` in float64 minus `coarse`
    mel: np.ndarray  # [256, 128]: the weight of each bin in each band


def frame_count(num_samples):
    """Number of whole frames in `num_samples`, an int or an array of at least 400 (snip_edges)."""
    return 1 + (num_samples - FRAME_LENGTH) // FRAME_SHIFT


def num_frames(num_samples: int) -> int:
    """Number of whole frames in `num_samples`; raises ValueError for fewer than 400 samples."""
    if num_samples < FRAME_LENGTH:
        raise ValueError(
            f"a waveform of {num_samples} samples is shorter than one frame of {FRAME_LENGTH} "
            f"({1000 * FRAME_LENGTH // SAMPLE_RATE_HZ} ms at {SAMPLE_RATE_HZ} Hz); pad with zeros"
        )
    return frame_count(num_samples)


def num_samples(num_frames: int) -> int:
    """The fewest samples that hold `num_frames` frames; raises ValueError for fewer than one."""
    if num_frames < 1:
        raise ValueError(f"num_frames={num_frames} must be at least 1; ask for one frame or more")
    return FRAME_LENGTH + FRAME_SHIFT * (num_frames - 1)


# --- samples ----------------------------------------------------------------------------------


def as_lengths(lengths, shape: tuple[int, int]) -> np.ndarray:
    """Returns the true lengths of waveforms of a shape [clips, samples], int32 [clips].

    Args:
      lengths: samples of each clip; None takes all clips as full.

    Raises:
      ValueError: not one length per clip, or one under 400 samples (one frame) or past the shape.
    """
    num_clips, num_samples = shape
    lengths = np.asarray([num_samples] * num_clips if lengths is None else lengths, np.int32)
    if lengths.shape != (num_clips,):
        raise ValueError(f"lengths are {lengths.shape}, expected one per clip, {num_clips}")
    for length in lengths:
        if not FRAME_LENGTH <= length <= num_samples:
            raise ValueError(
                f"a length of {length} samples, expected {FRAME_LENGTH} (25 ms, one frame) to "
                f"{num_samples}, those of the waveforms; pad shorter clips"
            )
    return lengths


def as_samples(array):
    """Returns samples of any type as int16 or float32, of the same shape.

    This is the rule for samples in files, data sets and arrays: they are finite; integers hold
    16-bit values; floats have full scale 1. Floats may pass full scale, which only shifts the log
    energies, but by less than a factor of 100.

    Args:
      array: a numpy or jax array of any shape, with concrete values.

    Raises:
      ValueError: another type, or values against the rule.
    """
    if array.dtype.kind in "biu":
        if array.dtype.itemsize == 1:
            raise ValueError(_type_message(array.dtype.name))
        if array.dtype != np.int16:
            least, greatest = int(array.min(initial=0)), int(array.max(initial=0))
            if least < -FULL_SCALE or greatest >= FULL_SCALE:
                raise ValueError(
                    f"{array.dtype} samples from {least} to {greatest} must be 16-bit values"
                    f" ({-FULL_SCALE} to {FULL_SCALE - 1}); scale them to 16 bits"
                )
        return array.astype(np.int16, copy=False)
    if not np.can_cast(array.dtype, np.float32, "same_kind"):
        raise ValueError(_type_message(array.dtype.name))
    if not (abs(array) <= _LOUDEST).all():  # on the device; there a maximum may pass over NaN
        check_peak(np.abs(np.asarray(array)).max())
    return array.astype(np.float32, copy=False)


def check_peak(peak) -> None:
    """Raises ValueError where float samples of this greatest magnitude are no audio."""
    if not np.isfinite(peak):
        raise ValueError("samples hold NaN or infinity, but must be finite; repair or remove them")
    if peak > _LOUDEST:
        raise ValueError(
            f"float samples have a peak of {float(peak):g} times full scale, so they are integers"
            f" stored as floats; divide them by {FULL_SCALE}"
        )


# --- on the device ----------------------------------------------------------------------------


def fbank(waveform: jax.Array) -> jax.Array:
    """Log-mel energies, float32 [..., frames, 128], of waveforms [..., samples] at 16 kHz.

    Frames are 25 ms long and 10 ms apart: frames = 1 + (samples - 400) // 160. An energy is the
    natural logarithm of the power in one of 128 bands from 20 Hz to 8 kHz, at least that of
    float32's epsilon (-15.94). Band 3 holds no bin of the 512-point transform and always has this
    least value, as in Kaldi.

    Args:
      waveform: float in [-1, 1], or int16, which is divided by 32,768.

    Raises:
      ValueError: fewer than 400 samples, or another type.
    """
    import jax.numpy as jnp

    waveform = jnp.asarray(waveform)
    if waveform.dtype == jnp.int16:
        samples = waveform.astype(jnp.float32) / FULL_SCALE
    elif jnp.issubdtype(waveform.dtype, jnp.floating):
        samples = waveform.astype(jnp.float32)
    else:
        raise ValueError(_type_message(waveform.dtype.name))
    constants = _constants()
    frames = _frames(samples, num_frames(samples.shape[-1]))
    coarse = jnp.round(frames * 2.0**_COARSE_BITS) * 2.0**-_COARSE_BITS
    spectrum = _product(coarse, constants.coarse) + (
        _product(coarse, constants.fine) + _product(frames - coarse, constants.full)
    )
    power = jnp.square(spectrum[..., :_NUM_BINS]) + jnp.square(spectrum[..., _NUM_BINS:])
    return jnp.log(jnp.maximum(_product(power, constants.mel), _ENERGY_FLOOR))


def _frames(samples: jax.Array, count: int) -> jax.Array:
    """[..., samples] to [..., count, 400] without a gather, by way of hops of 80 samples."""
    import jax.numpy as jnp

    shift = FRAME_SHIFT // _HOP
    before_last = (count - 1) * shift  # hops before the last frame
    num_hops = before_last + FRAME_LENGTH // _HOP
    hops = samples[..., : num_hops * _HOP].reshape(*samples.shape[:-1], num_hops, _HOP)
    # The k-th piece holds the k-th hop of every frame.
    pieces = [hops[..., k : k + before_last + 1 : shift, :] for k in range(FRAME_LENGTH // _HOP)]
    return jnp.concatenate(pieces, axis=-1)


def _product(x: jax.Array, matrix: np.ndarray) -> jax.Array:
    """The product in full float32; TPU and GPU would round the factors by default."""
    import jax

    return jax.numpy.matmul(x, matrix, precision=jax.lax.Precision.HIGHEST)


# --- in tf.data -------------------------------------------------------------------------------


def fbank_tf(waveform: tf.Tensor) -> tf.Tensor:
    """`fbank` of tensors [..., samples] for a tf.data pipeline; TensorFlow knows `samples`.

    It uses a fast Fourier transform in float64. On a CPU that costs less than half of one of the
    three products of `fbank`, and it is more accurate: 1e-6 from a computation all in float64. It
    computes blocks of frames that stay in a core's cache. The energies of a clip do not depend on
    its batch.

    Raises:
      ValueError: as `fbank`.
    """
    import tensorflow as tf

    bands = _band_groups(_constants().mel)
    waveform = tf.convert_to_tensor(waveform)
    if waveform.dtype != tf.int16 and not waveform.dtype.is_floating:
        raise ValueError(_type_message(waveform.dtype.name))
    full_scale = FULL_SCALE if waveform.dtype == tf.int16 else 1

    count = num_frames(waveform.shape[-1])
    whole, rest = divmod(FRAME_LENGTH, FRAME_SHIFT)
    num_blocks = -(-count // _BLOCK_FRAMES)
    block = -(-count // num_blocks)  # frames per block; the last block may go past the end

    def pieces(samples):
        # Rows of a frame's shift are sliced without a copy. Hops, as in `_frames`, would cost as
        # much as the transform.
        hops = tf.reshape(samples, [block + whole, FRAME_SHIFT])
        return [*(hops[k : k + block] for k in range(whole)), hops[whole:, :rest]]

    def energies(index):
        clip, number = index // num_blocks, index % num_blocks
        start = number * block * FRAME_SHIFT
        samples = clips[clip, start : start + (block + whole) * FRAME_SHIFT]
        samples = tf.cast(samples, tf.float64) / full_scale
        # The window is 0 at the first sample of a frame, so that sample needs no predecessor.
        emphasised = tf.pad(samples[1:] - _PRE_EMPHASIS * samples[:-1], [[1, 0]])
        sums = tf.add_n([tf.reduce_sum(piece, axis=1) for piece in pieces(samples)])
        offsets = (1.0 - _PRE_EMPHASIS) / FRAME_LENGTH * sums[:, None]
        frames = (tf.concat(pieces(emphasised), axis=1) - offsets) * _WINDOW
        spectrum = tf.signal.rfft(frames, [_FFT_LENGTH])
        power = tf.square(tf.math.real(spectrum)) + tf.square(tf.math.imag(spectrum))
        power = tf.cast(power, tf.float32)
        mel = tf.concat([tf.matmul(power[:, bins], weights) for bins, weights in bands], axis=1)
        return tf.math.log(tf.maximum(mel, _ENERGY_FLOOR))

    used = (count - 1) * FRAME_SHIFT + FRAME_LENGTH
    padding = (num_blocks * block + whole) * FRAME_SHIFT - used
    clips = tf.reshape(waveform, [-1, waveform.shape[-1]])[:, :used]
    clips = tf.pad(clips, [[0, 0], [0, padding]])
    logs = tf.map_fn(
        energies,
        tf.range(tf.shape(clips)[0] * num_blocks),
        parallel_iterations=1,
        fn_output_signature=tf.TensorSpec([block, NUM_MEL_BANDS], tf.float32),
    )
    logs = tf.reshape(logs, [-1, num_blocks * block, NUM_MEL_BANDS])[:, :count]
    logs = tf.reshape(logs, tf.concat([tf.shape(waveform)[:-1], [count, NUM_MEL_BANDS]], axis=0))
    return tf.ensure_shape(logs, [*waveform.shape[:-1], count, NUM_MEL_BANDS])


# --- both -------------------------------------------------------------------------------------


def _type_message(name: str) -> str:
    return f"samples of {name} must be int16 or float in [-1, 1]; convert them to one of them"


@functools.cache
def _constants() -> _Constants:
    full = _spectrum_matrix()
    coarse = np.round(full * 2.0**_COARSE_BITS) * 2.0**-_COARSE_BITS
    matrices = (full, coarse, full - coarse, _mel_matrix())
    return _Constants(*(matrix.astype(np.float32) for matrix in matrices))


def _spectrum_matrix() -> np.ndarray:
    """float64 [400, 512]: how much a sample of a frame adds to each bin, real then imaginary."""
    impulses = np.eye(FRAME_LENGTH)
    centred = impulses - np.mean(impulses, axis=1, keepdims=True)
    # In Kaldi the first sample is its own predecessor.
    previous = np.concatenate([centred[:, :1], centred[:, :-1]], axis=1)
    spectra = np.fft.rfft((centred - _PRE_EMPHASIS * previous) * _WINDOW, _FFT_LENGTH, axis=1)
    return np.concatenate([spectra.real[:, :_NUM_BINS], spectra.imag[:, :_NUM_BINS]], axis=1)


def _mel_matrix() -> np.ndarray:
    """float64 [256, 128]: triangles of height 1 and equal width on Kaldi's mel scale."""
    edges_mel = np.linspace(_mel(LOWEST_HZ), _mel(SAMPLE_RATE_HZ / 2), NUM_MEL_BANDS + 2)
    bins_mel = _mel(np.arange(_NUM_BINS) * SAMPLE_RATE_HZ / _FFT_LENGTH)[:, None]
    left, centre, right = edges_mel[:-2], edges_mel[1:-1], edges_mel[2:]
    rising = (bins_mel - left) / (centre - left)
    falling = (right - bins_mel) / (right - centre)
    return np.maximum(0.0, np.minimum(rising, falling))


def _band_groups(mel: np.ndarray) -> list[tuple[slice, np.ndarray]]:
    """For each of _BAND_GROUPS the slice of its bins, and their weights [bins, bands]."""
    groups = []
    for bands in _BAND_GROUPS:
        (bins,) = np.nonzero(mel[:, bands].any(axis=1))
        bins = slice(bins[0], bins[-1] + 1)
        groups.append((bins, mel[bins, bands]))
    return groups


def _mel(frequency_hz):
    return 1127.0 * np.log(1.0 + frequency_hz / 700.0)
