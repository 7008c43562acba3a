"""The embedded corpus: ten families of synthesised sounds, so that a first run needs no data.

A clip is a function of (family, index) alone: a Philox generator with the two as its key gives its
random numbers. So any process can make the clips in any order, the same to the bit on one machine.
Inside, time is in seconds, frequency in hertz, and sounds are float64 [samples] of any level.
"""

import zlib
from collections.abc import Callable, Iterator

import numpy as np

from maeast_jax.fbank import SAMPLE_RATE_HZ

CLIP_SECONDS = 2.5
CLIP_SAMPLES = int(CLIP_SECONDS * SAMPLE_RATE_HZ)
# A data set is found by its name alone. The version in the name changes with the sounds, because an
# old set may lie on disk.
NAME = "maeast_demo_v1"
SPLITS = {"train": range(90), "valid": range(90, 100)}  # indices within each family

_TOP_HZ = 7_600.0  # partials stay below, so that none aliases
_PENTATONIC = 2 ** (np.array([0, 3, 5, 7, 10, 12, 15, 17]) / 12)
_FORMANTS_HZ = np.array(  # rows: formants 1 to 4; columns: the vowels i, e, ae, a, o, u, er
    [
        (270.0, 530, 660, 730, 570, 300, 490),  # 1 to 3: Peterson and Barney (1952), men
        (2290, 1840, 1720, 1090, 840, 870, 1350),
        (3010, 2480, 2410, 2440, 2410, 2240, 1690),
        (3700, 3600, 3600, 3500, 3400, 3300, 3300),
    ]
)
_BELL_RATIOS = (  # church bell, struck bar, thick plate: partials over the fundamental
    (0.5, 1.0, 1.183, 1.506, 2.0, 2.514, 2.662, 3.011, 4.166, 5.433, 6.796),
    (1.0, 2.756, 5.404, 8.933, 13.34),
    (1.0, 1.594, 2.136, 2.653, 2.918, 3.598, 4.231, 5.131, 6.202),
)


# --- parts of sounds --------------------------------------------------------------------------


def times(seconds: float) -> np.ndarray:
    return np.arange(int(seconds * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ


def log_uniform(rng, low, high, size=None):
    return np.exp(rng.uniform(np.log(low), np.log(high), size))


def onsets(rng, gap_seconds: float, gaps=(1,)) -> Iterator[float]:
    """Yields the moments at which sounds start, from the clip's beginning to near its end."""
    start = rng.uniform(0.02, 0.3)
    while start < CLIP_SECONDS - 0.1:
        yield start
        start += gap_seconds * rng.choice(gaps)


def add(out: np.ndarray, start_seconds: float, sound: np.ndarray) -> None:
    """Mixes a sound into `out` and cuts it at the end of `out`."""
    start = int(start_seconds * SAMPLE_RATE_HZ)
    samples = max(0, min(len(sound), len(out) - start))
    out[start : start + samples] += sound[:samples]


def ramps(time: np.ndarray, attack_seconds: float, release_seconds: float) -> np.ndarray:
    """Returns an envelope of ones with raised-cosine ends."""
    rise = np.clip(time / attack_seconds, 0, 1)
    fall = np.clip((time[-1] - time) / release_seconds, 0, 1)
    return (0.5 - 0.5 * np.cos(np.pi * rise)) * (0.5 - 0.5 * np.cos(np.pi * fall))


def wander(rng, low: float, high: float, points: int) -> np.ndarray:
    """Returns a smooth walk through log-uniform values, as long as a clip."""
    knots = log_uniform(rng, low, high, points)
    position = np.linspace(0, points - 1, CLIP_SAMPLES)
    left = np.minimum(position.astype(int), points - 2)
    return knots[left] + np.diff(knots)[left] * (0.5 - 0.5 * np.cos(np.pi * (position - left)))


def noise(rng, samples: int, low_hz: float, high_hz: float, tilt: float = 0.0) -> np.ndarray:
    """Returns Gaussian noise in a band with soft edges, amplitude f^tilt, root mean square 1."""
    length = -(-samples // 400) * 400  # a large prime factor would slow the transform
    hz = np.fft.rfftfreq(length, 1 / SAMPLE_RATE_HZ) + 1.0
    gain = hz**tilt / np.sqrt((1 + (low_hz / hz) ** 6) * (1 + (hz / high_hz) ** 6))
    noise = np.fft.irfft(np.fft.rfft(rng.standard_normal(length)) * gain, length)[:samples]
    return noise / np.sqrt(np.mean(noise**2))


def wavetable(harmonics: np.ndarray, cycles: np.ndarray) -> np.ndarray:
    """Sums harmonics 1..M whose amplitudes, [periods, M], change from one period to the next.

    `cycles` [samples] is the fundamental's phase; it rises from 0 and stays below `periods`.
    """
    # The highest harmonic's period has 16 points or more: interpolation is clean to 34 dB there.
    length = 1 << (16 * harmonics.shape[1] - 1).bit_length()
    spectrum = np.pad(harmonics, ((0, 0), (1, 0)))
    table = np.append(np.fft.irfft(spectrum, length, axis=1).ravel(), 0.0) * length
    left = (cycles * length).astype(np.int64)
    return table[left] + (cycles * length - left) * (table[left + 1] - table[left])


def convolve(sound: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Returns the first len(sound) samples of the convolution."""
    length = 1 << (len(sound) + len(response) - 1).bit_length()
    product = np.fft.rfft(sound, length) * np.fft.rfft(response, length)
    return np.fft.irfft(product, length)[: len(sound)]


def in_room(rng, sound: np.ndarray) -> np.ndarray:
    """Returns the sound with four early echoes and a tail whose treble dies first."""
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


# --- the ten families -------------------------------------------------------------------------


def _strings(rng) -> np.ndarray:
    """Karplus-Strong: a burst of noise goes round a loop that averages neighbours.

    Here the loop's filter works on the harmonics, period by period: the same recursion in closed
    form, at any pitch.
    """
    out, degree, chord = np.zeros(CLIP_SAMPLES), 0, rng.choice([1, 1, 3])
    root_hz = log_uniform(rng, 82, 330)
    gap_seconds = log_uniform(rng, 0.16, 0.7)
    decay_seconds, pluck = log_uniform(rng, 0.25, 1.5), rng.uniform(0.08, 0.45)
    damping, sustain = rng.uniform(0.1, 0.5), rng.uniform(0.9, 3.0)
    for start in onsets(rng, gap_seconds, (1, 1, 1, 2)):
        time = times(min(sustain * gap_seconds, CLIP_SECONDS - start))
        for nth in range(chord):
            hz = root_hz * _PENTATONIC[(degree + 2 * nth) % 8]
            order = np.arange(1, int(_TOP_HZ / hz) + 1)
            burst = rng.standard_normal((2, len(order))) * np.sin(np.pi * order * pluck)
            mean = 1 - damping + damping * np.exp(2j * np.pi * order * hz / SAMPLE_RATE_HZ)
            loop = np.abs(mean) * np.exp(-1 / (hz * decay_seconds))
            harmonics = (burst[0] + 1j * burst[1]) * order**-0.7
            harmonics = harmonics * loop ** np.arange(int(hz * time[-1]) + 1)[:, None]
            sound = wavetable(harmonics, hz * time) * ramps(time, 0.002, 0.04)
            add(out, start + 0.018 * nth, rng.uniform(0.5, 1.0) * sound)
        degree += rng.integers(-2, 3)
    return out


def _drums(rng) -> np.ndarray:
    def skin(high_hz, low_hz, bend_seconds, decay_seconds):
        time = times(5 * decay_seconds)
        bend = (high_hz - low_hz) * bend_seconds * (1 - np.exp(-time / bend_seconds))
        return np.sin(2 * np.pi * (low_hz * time + bend)) * np.exp(-time / decay_seconds)

    def rattle(low_hz, decay_seconds):
        time = times(5 * decay_seconds)
        return 0.3 * noise(rng, len(time), low_hz, 7_800) * np.exp(-time / decay_seconds)

    tom_hz = rng.uniform(90, 200)
    kick = skin(rng.uniform(150, 400), rng.uniform(42, 75), 0.03, rng.uniform(0.06, 0.18))
    snare = rattle(rng.uniform(800, 2_000), rng.uniform(0.04, 0.12))
    add(snare, 0, 0.7 * skin(260, rng.uniform(150, 210), 0.02, 0.05))
    hat = 0.5 * rattle(rng.uniform(5_000, 6_500), log_uniform(rng, 0.012, 0.1))
    tom = 0.8 * skin(1.7 * tom_hz, tom_hz, 0.06, rng.uniform(0.08, 0.2))
    out, step_seconds = np.zeros(CLIP_SAMPLES), 15 / rng.uniform(80, 165)  # sixteenths
    hat_steps, swing_seconds = rng.choice([1, 2, 2, 4]), rng.uniform(0, 0.3) * step_seconds
    for step, start in enumerate(onsets(rng, step_seconds)):
        strikes = (
            (kick, step % 8 == 0 or rng.random() < 0.12),
            (snare, step % 8 == 4 or rng.random() < 0.06),
            (hat, step % hat_steps == 0),
            (tom, rng.random() < 0.1),
        )
        for drum, struck in strikes:
            add(out, start + step % 2 * swing_seconds, struck * rng.uniform(0.4, 1.0) * drum)
    return out


def _chirps(rng) -> np.ndarray:
    """Birds, a phrase of gliding syllables called again and again; a quarter are long sweeps."""
    sweeps = rng.random() < 0.25
    octave = rng.uniform(0, 0.25)
    centre_hz = log_uniform(rng, 1_200, 4_000)
    phrase, length = [], 0
    for _ in range(2 if sweeps else rng.integers(2, 6)):
        seconds = rng.uniform(0.4, 1.3) if sweeps else log_uniform(rng, 0.05, 0.3)
        ends_hz = centre_hz * log_uniform(rng, 0.6, 1.65, 2)
        if sweeps:
            ends_hz = rng.permutation((log_uniform(rng, 250, 900), log_uniform(rng, 2e3, 7e3)))
        time = times(seconds)
        hz = ends_hz[0] * (ends_hz[1] / ends_hz[0]) ** ((time / seconds) ** rng.uniform(0.5, 2))
        trill = rng.uniform(0, 0.1) * np.sin(2 * np.pi * rng.uniform(12, 35) * time)
        angle = 2 * np.pi * np.cumsum(hz * (1 + trill * (not sweeps))) / SAMPLE_RATE_HZ
        sound = np.sin(angle) + octave * np.sin(2 * angle) * (2.2 * hz < _TOP_HZ)
        phrase.append((length, sound * ramps(time, 0.2 * seconds, 0.4 * seconds)))
        length += seconds + rng.uniform(-0.3 if sweeps else 0.0, 0.08)
    out = np.zeros(CLIP_SAMPLES)
    for start in onsets(rng, length + rng.uniform(0.05, 0.4)):
        for offset_seconds, sound in phrase:
            add(out, start + offset_seconds, rng.uniform(0.6, 1.0) * sound)
    return out


def _vowels(rng) -> np.ndarray:
    """A voice: a glottal buzz through four resonances that move from vowel to vowel."""
    time, pitch_hz = times(CLIP_SECONDS), log_uniform(rng, 85, 300)
    vibrato = rng.uniform(0, 0.02) * np.sin(2 * np.pi * rng.uniform(4.5, 6.5) * time)
    hz = pitch_hz * wander(rng, 0.8, 1.3, rng.integers(3, 7)) * (1 + vibrato)
    hiss, level = np.zeros(CLIP_SAMPLES), np.zeros(CLIP_SAMPLES)
    knots, vowels, syllable_seconds = [0.0], [0], log_uniform(rng, 0.15, 0.7)
    for start in onsets(rng, syllable_seconds, (0.7, 1, 1.4)):
        seconds = syllable_seconds * rng.uniform(0.5, 0.9)
        add(level, start, rng.uniform(0.4, 1.0) * ramps(times(seconds), 0.04, 0.08))
        knots += [start, start + seconds]
        vowels += list(rng.integers(0, 7, 2))
        if rng.random() < 0.35:  # a sound such as s or sh
            burst = noise(rng, 1_600, rng.uniform(2_500, 4_500), 7_500)
            burst *= rng.uniform(0.03, 0.1) * ramps(times(0.1), 0.03, 0.03)
            add(hiss, max(0.0, start - 0.08), burst)
    cycles = np.cumsum(hz) / SAMPLE_RATE_HZ
    period = np.arange(int(cycles[-1]) + 1)
    order_hz = np.arange(1, int(_TOP_HZ / hz.max()) + 1) * np.interp(period, cycles, hz)[:, None]
    harmonics = (order_hz / 100) ** rng.uniform(-1.2, -0.7) + 0j
    shift = 0.75 + 0.1 * np.log2(pitch_hz / 20)  # a high voice comes from a small throat
    for formant_hz in _FORMANTS_HZ * shift:
        at_hz = np.interp(np.interp(period, cycles, time), knots, formant_hz[vowels])[:, None]
        width_hz = 60 + 0.04 * at_hz
        harmonics /= 1 - (order_hz / at_hz) ** 2 + 1j * order_hz * width_hz / at_hz**2
    voice = wavetable(harmonics, cycles)
    breath = 0.003 * noise(rng, CLIP_SAMPLES, 500, 6_000, -0.5)
    return hiss + (voice / np.abs(voice).max() + breath) * level


def _engines(rng) -> np.ndarray:
    """A motor: uneven firing through fixed resonances, its speed going up and down."""
    cylinders, points = rng.choice([2, 3, 4, 6]), rng.integers(2, 6)
    cycle_hz = rng.uniform(12, 32) * wander(rng, 0.5, 2.0, points)
    cycles = np.cumsum(cycle_hz) / SAMPLE_RATE_HZ
    period = np.arange(int(cycles[-1]) + 1)
    order = np.arange(1, min(300, int(_TOP_HZ / cycle_hz.max())) + 1)
    hz = order * np.interp(period, cycles, cycle_hz)[:, None]
    body = 0.1 + sum(1 / (1 + (4 * np.log(hz / at)) ** 2) for at in log_uniform(rng, 90, 4e3, 4))
    firing = np.where(order % cylinders, rng.uniform(0.02, 0.2) * rng.random(len(order)), 1.0)
    uneven = 1 + 0.1 * rng.standard_normal((len(period), 1))
    turn = np.exp(2j * rng.random(len(order)))
    pipe = body * order**-0.5 / (1 + (hz / rng.uniform(1_000, 2_500)) ** 2)
    tone = wavetable(uneven * firing * turn * pipe, cycles)
    puffs = (0.5 + 0.5 * np.cos(2 * np.pi * cylinders * cycles)) ** 3
    hiss = noise(rng, CLIP_SAMPLES, 300, rng.uniform(2_000, 6_000), -0.4) * (0.1 + puffs)
    loudness = (cycle_hz / cycle_hz.max()) ** rng.uniform(0.3, 1.5)
    return (tone / tone.std() + log_uniform(rng, 0.03, 0.3) * hiss) * loudness


def _bells(rng) -> np.ndarray:
    ratios = np.array(_BELL_RATIOS[rng.integers(0, 3)])
    base_hz = log_uniform(rng, 180, 1_100)
    ring_seconds = log_uniform(rng, 0.25, 1.5)
    colour = rng.uniform(0.3, 1.0, len(ratios)) * ratios ** -rng.uniform(0.2, 0.9)
    out = np.zeros(CLIP_SAMPLES)
    for start in onsets(rng, log_uniform(rng, 0.25, 1.2), (0.5, 1, 1, 1.5)):
        hz = base_hz * rng.choice(_PENTATONIC[:5]) * ratios
        hz = np.append(hz, hz + rng.uniform(0.5, 4.0, len(hz)))  # near pairs beat
        amplitude = np.append(colour, 0.5 * colour) * (hz < _TOP_HZ)
        decay_seconds = ring_seconds * (hz / base_hz) ** -0.6
        rate = (2j * np.pi * hz - 1 / decay_seconds) / SAMPLE_RATE_HZ
        samples = int((CLIP_SECONDS - start) * SAMPLE_RATE_HZ)
        turns = np.cumprod(np.broadcast_to(np.exp(rate)[:, None], (len(hz), samples)), axis=1)
        sound = (amplitude[:, None] * turns.imag).sum(axis=0)
        add(sound, 0, 0.3 * noise(rng, 320, 2_000, 7_000) * np.exp(-times(0.02) / 0.004))
        add(out, start, rng.uniform(0.4, 1.0) * sound)
    return out


def _noise_bands(rng) -> np.ndarray:
    """Gusts and sweeps: bands of noise of many widths that come, move and go."""
    out = np.zeros(CLIP_SAMPLES)
    for start in onsets(rng, log_uniform(rng, 0.2, 0.7), (0.6, 1, 1.5)):
        seconds = log_uniform(rng, 0.2, 1.3)
        from_hz = log_uniform(rng, 300, 5_500)
        to_hz = np.clip(from_hz * log_uniform(rng, 0.4, 2.5), 250, 6_000)
        time = times(seconds)
        centre_hz = from_hz * (to_hz / from_hz) ** (time / seconds)
        angle = 2 * np.pi * np.cumsum(centre_hz) / SAMPLE_RATE_HZ
        half_hz = 0.5 * log_uniform(rng, 0.08, 0.8) * min(from_hz, to_hz)
        inphase, quadrature = (noise(rng, len(time), 0, half_hz) for _ in range(2))
        band = inphase * np.cos(angle) + quadrature * np.sin(angle)
        attack_seconds = rng.uniform(0.02, 0.5) * seconds
        add(out, start, rng.uniform(0.3, 1) * band * ramps(time, attack_seconds, 0.4 * seconds))
    return out


def _fm(rng) -> np.ndarray:
    """Two-operator frequency modulation: the index, and with it the width, dies or wobbles."""
    ratio = rng.choice([0.5, 1.0, 1.41, 2.0, 2.76, 3.5])
    root_hz = log_uniform(rng, 140, 700)
    peak_index, wobble_hz = rng.uniform(2, 7), rng.choice([0, 1]) * rng.uniform(2, 9)
    out = np.zeros(CLIP_SAMPLES)
    gap_seconds = log_uniform(rng, 0.2, 0.9)
    fade = rng.uniform(0.5, 3)
    for start in onsets(rng, gap_seconds):
        hz, seconds = root_hz * rng.choice(_PENTATONIC[:6]), gap_seconds * rng.uniform(0.8, 1.4)
        time = times(seconds)
        wobble = 0.5 + 0.5 * np.sin(2 * np.pi * wobble_hz * time)
        index = wobble if wobble_hz else np.exp(-3 * time / seconds)
        index = index * min(peak_index, max(0.5, (_TOP_HZ / hz - 1) / ratio - 1))
        sound = np.sin(2 * np.pi * hz * time + index * np.sin(2 * np.pi * ratio * hz * time))
        sound *= rng.uniform(0.5, 1.0) * np.exp(-fade * time / seconds)
        add(out, start, sound * ramps(time, 0.008, 0.06))
    return out


def _rain(rng) -> np.ndarray:
    """A hiss that swells, hundreds of small drops, and large ones that ring in water."""
    swell = wander(rng, 0.15, 1.0, rng.integers(2, 6))
    hiss = noise(rng, CLIP_SAMPLES, rng.uniform(200, 900), 7_500, rng.uniform(-0.6, 0.0))
    out, drop_share = rng.uniform(0.02, 0.1) * hiss * swell, log_uniform(rng, 6e-4, 1e-2)
    for centre_hz in log_uniform(rng, 1_200, 6_000, 4):
        size = (rng.random(CLIP_SAMPLES) < swell * drop_share) * rng.normal(0, 0.4, CLIP_SAMPLES)
        decay = np.exp(-times(0.015) / rng.uniform(0.001, 0.004))
        out += convolve(size, 0.3 * decay * noise(rng, 240, centre_hz / 2, 2 * centre_hz))
    for start in rng.uniform(0, CLIP_SECONDS - 0.1, rng.integers(3, 25)):
        time, hz = times(rng.uniform(0.03, 0.09)), log_uniform(rng, 500, 3_000)
        angle = 2 * np.pi * hz * (time + rng.uniform(0, 4) * time**2)  # a closing bubble rises
        add(out, start, rng.uniform(0.3, 1.2) * np.sin(angle) * np.exp(-5 * time / time[-1]))
    return out


def _beeps(rng) -> np.ndarray:
    """Signals of machines: a short pattern of steady tones, repeated."""
    unit_seconds, square = log_uniform(rng, 0.05, 0.2), rng.random() < 0.5
    pool_hz = log_uniform(rng, 400, 3_200, rng.integers(1, 4))
    pair = rng.choice([0, 0, 1.2, 1.7])
    pattern, length = [], 0.0
    for hz in rng.choice(pool_hz, rng.integers(1, 6)):
        time = times(unit_seconds * rng.choice([1, 1, 2, 3]))
        orders = [n for n in (1, 3, 5, 7) if n * hz < _TOP_HZ][: 4 if square else 1]
        tone = sum(np.sin(2 * np.pi * n * hz * time) / n for n in orders)
        tone += (pair > 0) * np.sin(2 * np.pi * hz * pair * time)  # two at once, as on a keypad
        pattern.append((length, tone * ramps(time, 0.004, 0.004)))
        length += time[-1] + unit_seconds * rng.choice([0.5, 1, 1])
    out = np.zeros(CLIP_SAMPLES)
    for start in onsets(rng, length + rng.uniform(0.0, 0.5)):
        for offset_seconds, tone in pattern:
            add(out, start + offset_seconds, tone)
    return out


_ALL = (_strings, _drums, _chirps, _vowels, _engines, _bells, _noise_bands, _fm, _rain, _beeps)
_SYNTHESISERS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    family.__name__[1:]: family for family in _ALL
}
FAMILIES = tuple(_SYNTHESISERS)


def clip(family: str, index: int) -> np.ndarray:
    """Synthesises one clip: int16 [CLIP_SAMPLES], mono at SAMPLE_RATE_HZ.

    Its peak is 3 to 24 dB below full scale, over a noise floor 64 to 80 dB below.
    """
    rng = np.random.Generator(np.random.Philox(key=[zlib.crc32(family.encode()), index]))
    sound = in_room(rng, _SYNTHESISERS[family](rng))
    sound *= 10 ** (rng.uniform(-24, -3) / 20) / np.abs(sound).max()
    sound += 10 ** (rng.uniform(-80, -64) / 20) * noise(rng, CLIP_SAMPLES, 60, 7_900, -0.3)
    return np.rint(32_767 * sound).astype(np.int16)


def examples(split: str) -> Iterator[tuple[str, np.ndarray, str]]:
    """Yields (id, audio int16 [CLIP_SAMPLES], label) for every clip of a split."""
    for family in FAMILIES:
        for index in SPLITS[split]:
            yield f"{family}_{index:03d}", clip(family, index), family
