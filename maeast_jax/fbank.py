"""Kaldi's log-mel filter bank: matrix products on the device, a fast transform in tf.data.

Mean removal, pre-emphasis, window and Fourier transform of a frame are linear, so on the device
they are one matrix, built once in float64, from 400 samples to the 256 complex bins that the mel
bands use. A host computes them step by step in float64, which devices lack or are slow at.
The semantics are those of Kaldi's `compute-fbank-feats` without energy and dither, which the
authors of MAE-AST and SSAST reach through torchaudio's `compliance.kaldi.fbank`.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SAMPLE_RATE_HZ = 16_000
FRAME_LENGTH = 400  # samples: 25 ms
FRAME_SHIFT = 160  # samples: 10 ms
NUM_MEL_BANDS = 128

# The window is a symmetric Hann window to this power: 0.85 is Kaldi's "povey" window, its default
# and so MAE-AST's; SSAST asks for "hanning". SSAST's other two options change nothing here: the
# waveform's mean is part of each frame's mean, which is removed anyway, and `htk_compat` only moves
# an energy that is not computed.
WINDOW_POWERS = {"mae_ast": 0.85, "ssast": 1.0}

# The frame's length, zero-padded to a power of two (Kaldi's round_to_power_of_two).
_FFT_LENGTH = 512
_NUM_BINS = _FFT_LENGTH // 2  # Kaldi's mel bands leave out the bin at Nyquist
_PRE_EMPHASIS = 0.97
LOWEST_HZ = 20.0
_HOP = math.gcd(FRAME_LENGTH, FRAME_SHIFT)  # frames are whole numbers of these apart and long
_ENERGY_FLOOR = np.finfo(np.float32).eps

# Bits after the binary point in the coarse parts of samples and matrix (see `_Constants`). Their
# products then have 18, and float32 adds them without rounding up to sums of 2**(24 - 18) = 64.
_COARSE_BITS = 9

# Frames that a host transforms at a time, 1.6 MB in float64: of fewer the operations' overhead is
# felt, more leave the cache.
_BLOCK_FRAMES = 512
# Bands that a host computes at a time, each group of the few bins that it holds.
_BAND_GROUPS = (slice(0, 64), slice(64, 96), slice(96, 128))


class _Constants(NamedTuple):
    """Matrices of a variant, float32; columns of the first three: real parts, imaginary parts.

    Next to a pure tone most bands hold little more than the energy floor, and the rounding of one
    float32 product is then 1e-3 to 3e-3 of a log energy, more for some orders of summation. With
    samples and matrix each in a coarse and a fine part, x D = xc Dc + (xc Df + xf D): the first
    product is exact, the others are 2**-10 as large and so is their rounding (5e-5 is left).
    """

    full: np.ndarray  # [400, 512]
    coarse: np.ndarray  # [400, 512]: `full` to the nearest multiple of 2**-9
    fine: np.ndarray  # [400, 512]: what `coarse` leaves out, from float64
    mel: np.ndarray  # [256, 128]


def frame_count(num_samples):
    """Whole frames in `num_samples` of at least 400, numbers or arrays (Kaldi's snip_edges)."""
    return 1 + (num_samples - FRAME_LENGTH) // FRAME_SHIFT


def num_frames(num_samples: int) -> int:
    """Whole frames in so many samples; ValueError for fewer than 400."""
    if num_samples < FRAME_LENGTH:
        raise ValueError(
            f"a waveform of {num_samples} samples is shorter than one frame of {FRAME_LENGTH} "
            f"({1000 * FRAME_LENGTH // SAMPLE_RATE_HZ} ms at {SAMPLE_RATE_HZ} Hz); pad with zeros"
        )
    return frame_count(num_samples)


def num_samples(num_frames: int) -> int:
    """The fewest samples that give so many frames; ValueError for fewer than one frame."""
    if num_frames < 1:
        raise ValueError(f"num_frames={num_frames} must be at least 1; ask for one frame or more")
    return FRAME_LENGTH + FRAME_SHIFT * (num_frames - 1)


def fbank(waveform: jax.Array, variant: str = "mae_ast") -> jax.Array:
    """Log-mel energies, float32 [..., frames, 128], of waveforms [..., samples] at 16 kHz.

    Frames of 25 ms every 10 ms, frames = 1 + (samples - 400) // 160; natural log of the energy in
    128 bands from 20 Hz to Nyquist, floored at float32's epsilon (-15.94). Band 3 holds no bin of
    the 512-point transform and is always that floor, as in the original.

    waveform: float in [-1, 1], or int16, which is divided by 32,768.
    variant: "mae_ast" (povey window) or "ssast" (hanning window).

    Raises ValueError for fewer than 400 samples, another type or an unknown variant.
    """
    constants = _constants(variant)
    samples = _to_float32(jnp.asarray(waveform))
    frames = _frames(samples, num_frames(samples.shape[-1]))
    coarse = jnp.round(frames * 2.0**_COARSE_BITS) * 2.0**-_COARSE_BITS
    spectrum = _product(coarse, constants.coarse) + (
        _product(coarse, constants.fine) + _product(frames - coarse, constants.full)
    )
    power = jnp.square(spectrum[..., :_NUM_BINS]) + jnp.square(spectrum[..., _NUM_BINS:])
    return jnp.log(jnp.maximum(_product(power, constants.mel), _ENERGY_FLOOR))


def fbank_tf(waveform, variant: str = "mae_ast"):
    """`fbank` for a tf.data pipeline: tensors instead of arrays, any size may be unknown.

    By a fast Fourier transform in float64, which on a CPU costs less than half of one of the three
    products of `fbank`, and is closer: 1e-6 from all in float64. It goes through a clip in blocks
    of frames that stay in a core's cache, and a clip's energies do not depend on its batch.

    Raises ValueError as `fbank` does; where the number of samples is unknown until run time,
    InvalidArgumentError then.
    """
    import tensorflow as tf

    bands = _band_groups(_constants(variant).mel)
    window = np.hanning(FRAME_LENGTH) ** WINDOW_POWERS[variant]
    waveform = tf.convert_to_tensor(waveform)
    if waveform.dtype != tf.int16 and not waveform.dtype.is_floating:
        raise ValueError(_type_message(waveform.dtype.name))
    full_scale = 32_768.0 if waveform.dtype == tf.int16 else 1.0

    if waveform.shape[-1] is not None:
        count = num_frames(waveform.shape[-1])
    else:
        size = tf.shape(waveform)[-1]
        too_short = tf.debugging.assert_greater_equal(
            size, FRAME_LENGTH, f"a waveform is shorter than one frame of {FRAME_LENGTH} samples"
        )
        with tf.control_dependencies([too_short] if too_short is not None else []):
            count = frame_count(size)
    whole, rest = divmod(FRAME_LENGTH, FRAME_SHIFT)
    num_blocks = -(-count // _BLOCK_FRAMES)
    block = -(-count // num_blocks)  # frames of one; the last one's may go past the end

    def pieces(samples):
        # Whole rows are sliced without a copy; every second hop of half the length costs as much
        # as the transform.
        hops = tf.reshape(samples, [block + whole, FRAME_SHIFT])
        return [*(hops[k : k + block] for k in range(whole)), hops[whole:, :rest]]

    def energies(index):
        clip, number = index // num_blocks, index % num_blocks
        start = number * block * FRAME_SHIFT
        samples = clips[clip, start : start + (block + whole) * FRAME_SHIFT]
        samples = tf.cast(samples, tf.float64) / full_scale
        # The windows are 0 at a frame's first sample, so it needs no predecessor.
        emphasised = tf.pad(samples[1:] - _PRE_EMPHASIS * samples[:-1], [[1, 0]])
        sums = tf.add_n([tf.reduce_sum(piece, axis=1) for piece in pieces(samples)])
        offsets = (1.0 - _PRE_EMPHASIS) / FRAME_LENGTH * sums[:, None]
        frames = (tf.concat(pieces(emphasised), axis=1) - offsets) * window
        spectrum = tf.signal.rfft(frames, [_FFT_LENGTH])
        power = tf.square(tf.math.real(spectrum)) + tf.square(tf.math.imag(spectrum))
        power = tf.cast(power, tf.float32)
        mel = tf.concat([tf.matmul(power[:, bins], weights) for bins, weights in bands], axis=1)
        return tf.math.log(tf.maximum(mel, _ENERGY_FLOOR))

    used = (count - 1) * FRAME_SHIFT + FRAME_LENGTH
    padding = (num_blocks * block + whole) * FRAME_SHIFT - used
    clips = tf.reshape(waveform, [-1, tf.shape(waveform)[-1]])[:, :used]
    clips = tf.pad(clips, [[0, 0], [0, padding]])
    known = isinstance(count, int)
    logs = tf.map_fn(
        energies,
        tf.range(tf.shape(clips)[0] * num_blocks),
        parallel_iterations=1,
        fn_output_signature=tf.TensorSpec([block if known else None, NUM_MEL_BANDS], tf.float32),
    )
    logs = tf.reshape(logs, [-1, num_blocks * block, NUM_MEL_BANDS])[:, :count]
    logs = tf.reshape(logs, tf.concat([tf.shape(waveform)[:-1], [count, NUM_MEL_BANDS]], axis=0))
    shape = [*waveform.shape[:-1], count if known else None, NUM_MEL_BANDS]
    return tf.ensure_shape(logs, shape)


def _to_float32(waveform: jax.Array) -> jax.Array:
    """The waveform as float32 in [-1, 1]."""
    if waveform.dtype == jnp.int16:
        return waveform.astype(jnp.float32) / 32_768.0
    if jnp.issubdtype(waveform.dtype, jnp.floating):
        return waveform.astype(jnp.float32)
    raise ValueError(_type_message(waveform.dtype.name))


def _type_message(name: str) -> str:
    return f"a waveform of {name} must be int16 or float in [-1, 1]; convert it to one of them"


def _frames(samples: jax.Array, count: int) -> jax.Array:
    """[..., samples] to [..., count, 400] without a gather: 400 and 160 are both hops of 80."""
    num_hops = _hops_before(count) + FRAME_LENGTH // _HOP
    hops = samples[..., : num_hops * _HOP].reshape(*samples.shape[:-1], num_hops, _HOP)
    return jnp.concatenate(
        [hops[..., start:stop:step, :] for start, stop, step in _pieces(count)], axis=-1
    )


def _hops_before(count):
    """Hops before the last of `count` frames."""
    return (count - 1) * (FRAME_SHIFT // _HOP)


def _pieces(count) -> list[tuple]:
    """Slices (start, stop, step) of the hops, the k-th picking the k-th hop of every frame."""
    return [
        (k, k + _hops_before(count) + 1, FRAME_SHIFT // _HOP) for k in range(FRAME_LENGTH // _HOP)
    ]


def _product(x: jax.Array, matrix: np.ndarray) -> jax.Array:
    """Full float32, on TPU and GPU too, whose default would round the factors first."""
    return jnp.matmul(x, matrix, precision=jax.lax.Precision.HIGHEST)


@functools.cache
def _constants(variant: str) -> _Constants:
    if variant not in WINDOW_POWERS:
        raise ValueError(f"variant={variant!r} is unknown; known: {', '.join(WINDOW_POWERS)}")
    full = _spectrum_matrix(WINDOW_POWERS[variant])
    coarse = np.round(full * 2.0**_COARSE_BITS) * 2.0**-_COARSE_BITS
    matrices = (full, coarse, full - coarse, _mel_matrix())
    return _Constants(*(matrix.astype(np.float32) for matrix in matrices))


def _spectrum_matrix(window_power: float) -> np.ndarray:
    """float64 [400, 512]: what each sample of a frame adds to every bin, real then imaginary."""
    impulses = np.eye(FRAME_LENGTH)
    centred = impulses - np.mean(impulses, axis=1, keepdims=True)
    # Kaldi gives the first sample itself as its predecessor.
    previous = np.concatenate([centred[:, :1], centred[:, :-1]], axis=1)
    window = np.hanning(FRAME_LENGTH) ** window_power
    spectra = np.fft.rfft((centred - _PRE_EMPHASIS * previous) * window, _FFT_LENGTH, axis=1)
    return np.concatenate([spectra.real[:, :_NUM_BINS], spectra.imag[:, :_NUM_BINS]], axis=1)


def _mel_matrix() -> np.ndarray:
    """float64 [256, 128]: triangles of height 1 that are equally wide on Kaldi's mel scale."""
    edges_mel = np.linspace(_mel(LOWEST_HZ), _mel(SAMPLE_RATE_HZ / 2), NUM_MEL_BANDS + 2)
    bins_mel = _mel(np.arange(_NUM_BINS) * SAMPLE_RATE_HZ / _FFT_LENGTH)[:, None]
    left, centre, right = edges_mel[:-2], edges_mel[1:-1], edges_mel[2:]
    rising = (bins_mel - left) / (centre - left)
    falling = (right - bins_mel) / (right - centre)
    return np.maximum(0.0, np.minimum(rising, falling))


def _band_groups(mel: np.ndarray) -> list[tuple[slice, np.ndarray]]:
    """The bins of each of _BAND_GROUPS, and the weights [bins, bands] in them."""
    groups = []
    for bands in _BAND_GROUPS:
        (bins,) = np.nonzero(mel[:, bands].any(axis=1))
        bins = slice(bins[0], bins[-1] + 1)
        groups.append((bins, mel[bins, bands]))
    return groups


def _mel(frequency_hz):
    return 1127.0 * np.log(1.0 + frequency_hz / 700.0)
