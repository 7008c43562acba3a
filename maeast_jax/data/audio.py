"""Audio files and arrays of any kind to 16 kHz mono 16-bit samples.

Decoders and resampler are imported where they are used: training and the benchmark need none.
"""

import os
from collections.abc import Iterator

import numpy as np

SAMPLE_RATE_HZ = 16_000
# fmt: off
AUDIO_SUFFIXES = frozenset({
    ".3gp", ".aac", ".ac3", ".aif", ".aifc", ".aiff", ".amr", ".au", ".caf", ".flac", ".m4a",
    ".m4b", ".mka", ".mkv", ".mov", ".mp3", ".mp4", ".oga", ".ogg", ".ogv", ".opus", ".rf64",
    ".snd", ".spx", ".w64", ".wav", ".webm", ".wma", ".wv",
})
# fmt: on

_FULL_SCALE = 32_768  # of int16; soundfile and FFmpeg divide by it, so 16-bit files return exactly
_LOUDEST = 100.0  # times full scale: no recording, but what integers kept as floats look like
_BLOCK_FRAMES = 1 << 18


class UndecodableError(ValueError):
    """No decoder reads the file, or what it holds is no audio.

    Attributes:
      path: the file.
      reason: one line, without the path.
    """

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)  # both, so that it survives pickling between processes
        self.path = path
        self.reason = reason

    def __str__(self):
        return f"{self.path}: {self.reason}"


def decode(path: str | os.PathLike) -> np.ndarray:
    """Decodes an audio file, or the first audio stream of a video file.

    soundfile reads it where it can and PyAV (FFmpeg) where soundfile cannot. Channels are averaged,
    other rates resampled (soxr HQ); a 16-bit 16 kHz mono file comes back bit for bit. The file is
    read in blocks: at most the int16 result is ever in memory at its full length.

    Returns:
      int16 [samples], 16 kHz, at least one sample.

    Raises:
      UndecodableError: not a file; both decoders fail; no sample, or samples that are not audio.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise UndecodableError(path, "is not a file" if os.path.exists(path) else "not found")
    reasons = []
    for decoder, read_blocks in (("soundfile", _soundfile_blocks), ("PyAV", _av_blocks)):
        try:
            return _to_mono_int16(read_blocks(path))
        except (ImportError, MemoryError):
            raise  # about this machine, not about the file
        except Exception as error:  # Broken files make decoders raise errors of any type.
            reasons.append(f"{decoder}: {_one_line(error, path)}")
    raise UndecodableError(path, "; ".join(reasons))


def to_int16(waveform: np.ndarray, sample_rate_hz: int) -> np.ndarray:
    """Converts samples in memory, of any rate, to what `decode` returns.

    Args:
      waveform: [samples] or [samples, channels]. int16; wider integers that hold 16-bit values, as
        TFDS stores audio; or floats of full scale 1 (what exceeds it is clipped).
      sample_rate_hz: its rate.

    Returns:
      int16 [samples], 16 kHz.

    Raises:
      ValueError: another shape or type, a value outside 16 bits, or floats that are no audio.
    """
    waveform = np.asarray(waveform)
    if waveform.ndim not in (1, 2) or 0 in waveform.shape[1:]:
        raise ValueError(
            f"audio of shape {list(waveform.shape)}, expected [samples] or [samples, channels]"
        )
    if np.issubdtype(waveform.dtype, np.integer) and waveform.dtype.itemsize > 1:
        waveform = _narrow(waveform)
        if waveform.ndim == 1 and sample_rate_hz == SAMPLE_RATE_HZ:
            return waveform
        waveform = waveform.astype(np.float32) / _FULL_SCALE
    elif not np.issubdtype(waveform.dtype, np.floating):
        raise ValueError(
            f"audio of type {waveform.dtype}, expected int16, 16-bit values in wider integers, or"
            " floats in [-1, 1]"
        )
    channels_last = waveform[:, None] if waveform.ndim == 1 else waveform
    mono = _mono(channels_last.astype(np.float32, copy=False))
    if sample_rate_hz != SAMPLE_RATE_HZ:
        import soxr

        mono = soxr.resample(mono, sample_rate_hz, SAMPLE_RATE_HZ, quality="HQ")
    return _quantise(mono)


def _narrow(waveform: np.ndarray) -> np.ndarray:
    """int16 of the same values; ValueError where one does not fit."""
    if waveform.dtype != np.int16 and waveform.size:
        for value in (waveform.min(), waveform.max()):
            if not -_FULL_SCALE <= value < _FULL_SCALE:
                raise ValueError(
                    f"sample value {value} in {waveform.dtype} audio, expected 16-bit values"
                    f" ({-_FULL_SCALE} to {_FULL_SCALE - 1}); scale the audio to 16 bits"
                )
    return waveform.astype(np.int16, copy=False)


def _mono(block: np.ndarray) -> np.ndarray:
    """float32 [samples, channels] to [samples], checked; ValueError where it is no audio."""
    peak = np.abs(block).max(initial=0.0)
    if not peak <= _LOUDEST:  # also true of NaN
        what = f"a peak of {peak:g} times full scale" if np.isfinite(peak) else "NaN or infinity"
        raise ValueError(f"samples hold {what}, expected finite values in [-1, 1]")
    return block[:, 0] if block.shape[1] == 1 else block.mean(axis=1)


def _quantise(mono: np.ndarray) -> np.ndarray:
    """float32 [samples] in [-1, 1] to int16, rounded and clipped."""
    scaled = np.rint(mono * np.float32(_FULL_SCALE))
    return np.clip(scaled, -_FULL_SCALE, _FULL_SCALE - 1).astype(np.int16)


def _to_mono_int16(blocks: Iterator[tuple[np.ndarray, int]]) -> np.ndarray:
    """Joins (float32 [samples, channels], rate) blocks to int16 [samples] at 16 kHz."""
    pieces = []
    first_rate_hz, resampler = None, None
    for block, rate_hz in blocks:
        if first_rate_hz is None:
            first_rate_hz = rate_hz
            if rate_hz != SAMPLE_RATE_HZ:
                import soxr

                resampler = soxr.ResampleStream(
                    rate_hz, SAMPLE_RATE_HZ, num_channels=1, dtype="float32", quality="HQ"
                )
        if rate_hz != first_rate_hz:
            raise ValueError(f"the sample rate changes from {first_rate_hz} to {rate_hz} Hz")
        mono = _mono(block)
        pieces.append(_quantise(resampler.resample_chunk(mono) if resampler else mono))
    if resampler:
        rest = resampler.resample_chunk(np.zeros(0, np.float32), last=True)
        pieces.append(_quantise(rest))
    if not sum(map(len, pieces)):
        raise ValueError("no samples")
    return np.concatenate(pieces)


def _soundfile_blocks(path: str) -> Iterator[tuple[np.ndarray, int]]:
    import soundfile

    with soundfile.SoundFile(path) as file:
        while len(block := file.read(_BLOCK_FRAMES, dtype="float32", always_2d=True)):
            yield block, file.samplerate


def _av_blocks(path: str) -> Iterator[tuple[np.ndarray, int]]:
    import av

    # "file:" keeps a colon in a name from being read as a protocol, and the list of protocols keeps
    # a playlist that poses as audio from fetching anything.
    with av.open(
        f"file:{path}", metadata_errors="ignore", options={"protocol_whitelist": "file"}
    ) as container:
        if not container.streams.audio:
            raise ValueError("no audio stream")
        for frame in container.decode(audio=0):
            yield _frame_samples(frame), frame.sample_rate


def _frame_samples(frame) -> np.ndarray:
    """float32 [samples, channels] of a frame in any of FFmpeg's sample formats."""
    values = frame.to_ndarray()
    # A planar frame is [channels, samples], a packed one [1, samples * channels].
    block = values.T if frame.format.is_planar else values.reshape(frame.samples, -1)
    if block.dtype == np.uint8:
        return (block.astype(np.float32) - 128) / 128
    if np.issubdtype(block.dtype, np.integer):
        return block.astype(np.float32) / -float(np.iinfo(block.dtype).min)
    return block.astype(np.float32)


def _one_line(error: Exception, path: str) -> str:
    """The error's message without FFmpeg's number or the path, which the caller names once."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.replace(f"Error opening {path!r}: ", "").split())
