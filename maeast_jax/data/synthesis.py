"""Parts that sounds are made of: envelopes, noise, wavetables, rooms.

Time in seconds, frequency in hertz, sounds float64 [samples] of any level, random numbers from the
generator given.
"""

from collections.abc import Iterator

import numpy as np

SAMPLE_RATE_HZ = 16_000
CLIP_SECONDS = 2.5
CLIP_SAMPLES = int(CLIP_SECONDS * SAMPLE_RATE_HZ)


def times(seconds: float) -> np.ndarray:
    return np.arange(int(seconds * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ


def log_uniform(rng, low, high, size=None):
    return np.exp(rng.uniform(np.log(low), np.log(high), size))


def onsets(rng, gap_seconds: float, gaps=(1,)) -> Iterator[float]:
    """Moments at which something starts, from soon after the clip's beginning to near its end."""
    start = rng.uniform(0.02, 0.3)
    while start < CLIP_SECONDS - 0.1:
        yield start
        start += gap_seconds * rng.choice(gaps)


def add(out: np.ndarray, start_seconds: float, sound: np.ndarray) -> None:
    """Mixes a sound into `out`; what reaches past the end is cut."""
    start = int(start_seconds * SAMPLE_RATE_HZ)
    samples = max(0, min(len(sound), len(out) - start))
    out[start : start + samples] += sound[:samples]


def ramps(time: np.ndarray, attack_seconds: float, release_seconds: float) -> np.ndarray:
    """An envelope of ones with raised-cosine ends."""
    rise = np.clip(time / attack_seconds, 0, 1)
    fall = np.clip((time[-1] - time) / release_seconds, 0, 1)
    return (0.5 - 0.5 * np.cos(np.pi * rise)) * (0.5 - 0.5 * np.cos(np.pi * fall))


def wander(rng, low: float, high: float, points: int) -> np.ndarray:
    """A smooth walk through log-uniform values, over a whole clip."""
    knots = log_uniform(rng, low, high, points)
    position = np.linspace(0, points - 1, CLIP_SAMPLES)
    left = np.minimum(position.astype(int), points - 2)
    return knots[left] + np.diff(knots)[left] * (0.5 - 0.5 * np.cos(np.pi * (position - left)))


def noise(rng, samples: int, low_hz: float, high_hz: float, tilt: float = 0.0) -> np.ndarray:
    """Gaussian noise in a band with soft edges, amplitude as f^tilt, root mean square 1."""
    length = -(-samples // 400) * 400  # no large prime factor, which would slow the transform
    hz = np.fft.rfftfreq(length, 1 / SAMPLE_RATE_HZ) + 1.0
    gain = hz**tilt / np.sqrt((1 + (low_hz / hz) ** 6) * (1 + (hz / high_hz) ** 6))
    noise = np.fft.irfft(np.fft.rfft(rng.standard_normal(length)) * gain, length)[:samples]
    return noise / np.sqrt(np.mean(noise**2))


def wavetable(harmonics: np.ndarray, cycles: np.ndarray) -> np.ndarray:
    """Sums harmonics 1..M whose amplitudes, [periods, M], change from one period to the next.

    `cycles` [samples] is the fundamental's phase; it rises from 0 and stays below `periods`.
    """
    # Sixteen points or more to the highest harmonic's period: interpolation is 34 dB clean there.
    length = 1 << (16 * harmonics.shape[1] - 1).bit_length()
    spectrum = np.pad(harmonics, ((0, 0), (1, 0)))
    table = np.append(np.fft.irfft(spectrum, length, axis=1).ravel(), 0.0) * length
    left = (cycles * length).astype(np.int64)
    return table[left] + (cycles * length - left) * (table[left + 1] - table[left])


def convolve(sound: np.ndarray, response: np.ndarray) -> np.ndarray:
    """The first len(sound) samples of the convolution."""
    length = 1 << (len(sound) + len(response) - 1).bit_length()
    product = np.fft.rfft(sound, length) * np.fft.rfft(response, length)
    return np.fft.irfft(product, length)[: len(sound)]


def in_room(rng, sound: np.ndarray) -> np.ndarray:
    """The sound, four early echoes, and a tail whose treble dies first."""
    decay_seconds, wet = log_uniform(rng, 0.08, 0.9), rng.uniform(0.02, 0.35)  # to -60 dB
    time = times(min(decay_seconds, 0.8))
    response = np.zeros_like(time)
    for low_hz, high_hz, share in ((80, 1_200, 1.0), (1_200, 7_000, 0.6)):
        decay = np.exp(-6.9 * time / (decay_seconds * share))
        response += share * decay * noise(rng, len(time), low_hz, high_hz)
    response *= wet / np.sqrt(np.sum(response**2))
    response[rng.integers(60, 640, 4)] += wet * rng.uniform(-0.5, 0.5, 4)
    response[0] = 1.0
    return convolve(sound, response)
