"""Decodes audio files and arrays of any kind to int16 samples, mono, 16 kHz.

`decode` reads one file, `DecodePool` many files in several processes. Decoders and resamplers are
imported where they are used, because training and the benchmark need none.
"""

import collections
import concurrent.futures
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from maeast_jax.fbank import SAMPLE_RATE_HZ
from maeast_jax.runtime import terminal

# fmt: off
AUDIO_SUFFIXES = frozenset({
    ".3g2", ".3gp", ".8svx", ".aa3", ".aac", ".ac3", ".adts", ".aif", ".aifc", ".aiff", ".amr",
    ".ape", ".asf", ".au", ".avi", ".avr", ".awb", ".bwf", ".caf", ".dff", ".dsf", ".dts", ".eac3",
    ".ec3", ".f4v", ".flac", ".flv", ".g722", ".gsm", ".ircam", ".loas", ".m2a", ".m2ts", ".m4a",
    ".m4b", ".m4r", ".m4v", ".mka", ".mkv", ".mmf", ".mov", ".mp1", ".mp2", ".mp3", ".mp4", ".mpa",
    ".mpc", ".mpeg", ".mpg", ".mpga", ".mts", ".mxf", ".nist", ".nut", ".oga", ".ogg", ".ogv",
    ".ogx", ".oma", ".opus", ".paf", ".pvf", ".qcp", ".ra", ".rf64", ".rm", ".sd2", ".sds", ".sf",
    ".shn", ".snd", ".sph", ".spx", ".tak", ".tta", ".vob", ".voc", ".w64", ".wav", ".wave",
    ".weba", ".webm", ".wma", ".wmv", ".wv", ".wv1", ".wv2", ".wve",
})
# fmt: on

# Full scale of int16. soundfile and FFmpeg divide by it, so 16-bit files come back exactly.
_FULL_SCALE = 32_768
# Samples this many times above full scale are not audio but integers stored as floats.
_LOUDEST = 100.0
_BLOCK_FRAMES = 1 << 18
# After this many deaths in a row the machine is out of memory; so many files are not broken.
_MOST_DEATHS = 10


class UndecodableError(ValueError):
    """No decoder reads the file, or it holds no audio; `reason` is one line without the path."""

    def __init__(self, path: str, reason: str):
        super().__init__(f"{path}: {reason}")
        self.reason = reason


class DecoderDiedError(OSError):
    """Decoding processes die on one file after another, for example for lack of memory."""


# --- one file or array ------------------------------------------------------------------------


def decode(path: str | os.PathLike) -> np.ndarray:
    """Returns the samples of an audio file, or of the first audio stream of a video file.

    soundfile reads the file if it can, otherwise PyAV (FFmpeg). Channels are averaged, other rates
    resampled (soxr HQ). A 16-bit mono file at 16 kHz comes back bit for bit. The file is read in
    blocks: only the int16 result is ever in memory at its full length.

    Returns:
      int16 [samples], 16 kHz, at least one sample.

    Raises:
      UndecodableError: the path is not a file, both decoders fail, or there are no samples or
        samples that are not audio.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise UndecodableError(path, "is not a file" if os.path.exists(path) else "not found")
    reasons = []
    for decoder, read_blocks in (("soundfile", _soundfile_blocks), ("PyAV", _av_blocks)):
        try:
            return _to_mono_int16(read_blocks(path))
        except (ImportError, MemoryError):
            raise  # The machine is at fault and not the file.
        except Exception as error:  # Broken files make decoders raise errors of any type.
            # libsndfile's own words come without the path, which UndecodableError adds.
            reason = getattr(error, "error_string", None) or terminal.one_line(error)
            reasons.append(f"{decoder}: {reason}")
    raise UndecodableError(path, "; ".join(reasons))


def to_int16(waveform: np.ndarray, sample_rate_hz: int) -> np.ndarray:
    """Converts samples in memory, of any rate, to the form that `decode` returns.

    Args:
      waveform: [samples] or [samples, channels]. int16; wider integers that hold 16-bit values, as
        TFDS stores audio; or floats of full scale 1, which are clipped beyond it.
      sample_rate_hz: rate of `waveform`.

    Returns:
      int16 [samples], 16 kHz.

    Raises:
      ValueError: no samples, another shape or type, a value outside 16 bits, or floats that are
        not audio.
    """
    waveform = np.asarray(waveform)
    if waveform.ndim not in (1, 2) or not waveform.size:
        raise ValueError(
            f"audio of shape {list(waveform.shape)}, expected [samples] or [samples, channels] with"
            " at least one sample"
        )
    if np.issubdtype(waveform.dtype, np.integer) and waveform.dtype.itemsize > 1:
        least, greatest = waveform.min(), waveform.max()
        if least < -_FULL_SCALE or greatest >= _FULL_SCALE:
            raise ValueError(
                f"{waveform.dtype} audio with values from {least} to {greatest}, expected 16-bit"
                f" values ({-_FULL_SCALE} to {_FULL_SCALE - 1}); scale the audio to 16 bits"
            )
        if waveform.ndim == 1 and sample_rate_hz == SAMPLE_RATE_HZ:
            return waveform.astype(np.int16, copy=False)
        waveform = waveform.astype(np.float32) / _FULL_SCALE
    elif not np.issubdtype(waveform.dtype, np.floating):
        raise ValueError(
            f"audio of type {waveform.dtype}, expected int16, 16-bit values in wider integers, or"
            " floats in [-1, 1]"
        )
    channels_last = waveform[:, None] if waveform.ndim == 1 else waveform
    mono = _mono(channels_last.astype(np.float32, copy=False))
    if sample_rate_hz != SAMPLE_RATE_HZ:
        import librosa  # A second to import, and only data sets of other rates need it.

        # With fix=True librosa would append a sample to some lengths.
        mono = librosa.resample(
            mono, orig_sr=sample_rate_hz, target_sr=SAMPLE_RATE_HZ, res_type="soxr_hq", fix=False
        )
    return _quantise(mono)


def _mono(block: np.ndarray) -> np.ndarray:
    """float32 [samples, channels] to [samples]; raises ValueError where it is not audio."""
    peak = np.abs(block).max(initial=0.0)
    if not peak <= _LOUDEST:  # also for NaN
        found = f"a peak of {peak:g} times full scale" if np.isfinite(peak) else "NaN or infinity"
        raise ValueError(f"samples hold {found}, expected finite values in [-1, 1]")
    return block[:, 0] if block.shape[1] == 1 else block.mean(axis=1)


def _quantise(mono: np.ndarray) -> np.ndarray:
    """float32 [samples] in [-1, 1] to int16, rounded and clipped."""
    scaled = np.rint(mono * np.float32(_FULL_SCALE))
    return np.clip(scaled, -_FULL_SCALE, _FULL_SCALE - 1).astype(np.int16)


def _to_mono_int16(blocks: Iterator[tuple[np.ndarray, int]]) -> np.ndarray:
    """Joins blocks (float32 [samples, channels], rate in Hz) to int16 [samples] at 16 kHz."""
    pieces = []
    first_rate_hz, resampler = None, None
    for block, rate_hz in blocks:
        if first_rate_hz is None:
            first_rate_hz = rate_hz
            if rate_hz != SAMPLE_RATE_HZ:
                import soxr  # librosa resamples whole arrays alone.

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

    # "file:" keeps FFmpeg from reading a colon in the name as a protocol. The list of protocols
    # keeps a playlist that poses as audio from fetching anything.
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
    # A planar frame is [channels, samples], a packed frame [1, samples * channels].
    block = values.T if frame.format.is_planar else values.reshape(frame.samples, -1)
    if block.dtype == np.uint8:
        return (block.astype(np.float32) - 128) / 128
    if np.issubdtype(block.dtype, np.integer):
        return block.astype(np.float32) / -float(np.iinfo(block.dtype).min)
    return block.astype(np.float32)


# --- many files -------------------------------------------------------------------------------


class DecodePool:
    """Processes that decode audio files. A context manager; leaving it ends the processes."""

    def __init__(self, num_processes: int):
        self._num_processes = num_processes
        self._start()
        self._deaths = 0  # in a row

    def __enter__(self) -> "DecodePool":
        return self

    def __exit__(self, *exc_info) -> None:
        self._executor.shutdown(cancel_futures=True)

    def decode(self, paths: Sequence[str]) -> Iterator[np.ndarray | str]:
        """Yields for each path, in order, int16 [samples] at 16 kHz, or why it is undecodable.

        At most four files per process are under way, because results wait in memory. Where a
        process dies, each file under way is decoded again alone. A file that kills its process
        again is undecodable, and the others go on.

        Raises:
          DecoderDiedError: processes die on ten files in a row.
        """
        rest = iter(paths)
        under_way = collections.deque()
        while True:
            # After a death, files under way are decoded again, each alone, before any new file.
            if not any(future.done() and _is_broken(future) for _, future in under_way):
                for path in itertools.islice(rest, 4 * self._num_processes - len(under_way)):
                    under_way.append((path, self._submit(path)))
            if not under_way:
                return
            yield self._result(*under_way.popleft())

    def _result(self, path: str, future: concurrent.futures.Future) -> np.ndarray | str:
        if _is_broken(future):
            future = self._submit(path)
        if not _is_broken(future):
            self._deaths = 0
            return future.result()
        self._deaths += 1
        if self._deaths == _MOST_DEATHS:
            raise DecoderDiedError(
                f"decoding processes died on {self._deaths} files in a row, the last of them"
                f" {path}: take them out, or, if memory ran out, free some, or pass a smaller"
                " --num_processes"
            )
        return "its decoder died (crashed, or out of memory)"

    def _start(self) -> None:
        # A forked child could wait for ever for locks that TensorFlow's threads hold.
        context = multiprocessing.get_context("spawn")
        self._executor = concurrent.futures.ProcessPoolExecutor(
            self._num_processes, context, _follow_parent
        )

    def _submit(self, path: str) -> concurrent.futures.Future:
        try:
            return self._executor.submit(_decode, path)
        except BrokenProcessPool:
            self._executor.shutdown()
            self._start()
            return self._executor.submit(_decode, path)


def num_cores() -> int:
    """Number of cores that this process may use; in a batch job fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _is_broken(future: concurrent.futures.Future) -> bool:
    """Waits for the future; whether its process died."""
    return isinstance(future.exception(), BrokenProcessPool)


def _decode(path: str) -> np.ndarray | str:
    """What a decoding process runs."""
    try:
        return decode(path)
    except UndecodableError as error:
        return error.reason
    except MemoryError:
        os._exit(1)  # As if killed: decoded alone, the file may fit into memory.


def _follow_parent() -> None:
    """Runs first in a decoding process, which would outlive a killed parent and wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent handles Ctrl-C and ends this process.

    def wait_and_exit():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait_and_exit, daemon=True).start()
