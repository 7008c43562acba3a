"""Decodes audio files and arrays of any kind to int16 samples, mono, 16 kHz.

`decode` reads one file, `DecodePool` many files in several processes. Both follow these rules:

- Samples are those that `fbank.as_samples` accepts.
- Channels are averaged. Where they cancel each other, the loudest one is taken alone.
- Sound whose peak is beyond full scale is scaled down as a whole, and never clipped.
- A damaged file is read as far as possible, and a remark says what is missing.

Decoders and resamplers are imported where they are used, because training and the benchmark need
none.
"""

import collections
import concurrent.futures
import functools
import itertools
import mmap
import multiprocessing
import os
import re
import signal
import struct
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np

from maeast_jax.fbank import FULL_SCALE, SAMPLE_RATE_HZ, as_samples, check_peak
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

# Channels cancel where their mean has less than this part of the power that a channel has on
# average. The mean of two unlike channels has a half.
_LEAST_MEAN_POWER = 0.01
# Lossy codecs and resamplers often pass full scale by up to this factor, which needs no remark.
_OVERSHOOT = 1.5
# So many blocks are joined before the arithmetic, because FFmpeg's are as small as 64 samples. More
# of them would not fit into the cache.
_BLOCKS_AT_ONCE = 8
_BLOCK_FRAMES = 1 << 13
# After this many deaths in a row the machine is out of memory; so many files are not broken.
_MOST_DEATHS = 10

# The first bytes of lossless formats, which libsndfile reads two to ten times faster than FFmpeg.
# Of other compressed files it reads only the first stream, without an error, and FFmpeg reads on.
_LOSSLESS = re.compile(rb"RIF[FX]....WAVE|RF64|riff|FORM|\.snd|caff|fLaC|\xf0~", re.DOTALL)
# After the sound of a RIFF file follow chunks, or zeros as padding. Anything else is sound.
_CHUNK_NAME, _NOT_ZERO = re.compile(rb"(?!RIFF)[ -~]{4}"), re.compile(rb"[^\0]")
# A FLAC stream starts with this and its first block of metadata, which has 34 bytes. Compressed
# sound holds the four letters alone by chance once in 4 GB.
_FLAC_START = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22")
# libsndfile's log where a header counts more bytes of sound than the file holds.
_SHORTENED = re.compile(
    r"^ *(?:data|SSND|Data Size|riff) *: (\d+) \(should be (\d+)\)", re.MULTILINE
)
# Programs that write to a pipe state lengths from here on, because they do not know the length.
_UNKNOWN_BYTES = 2**31 - 2**16
# FFmpeg's formats whose header counts the sound. For others FFmpeg estimates a duration.
_COUNTING = ("flac", "mov,mp4,m4a,3gp,3g2,mj2", "aiff", "caf")
# Tags between joined files reach the decoder as packets, but hold no sound.
_TAGS = (b"ID3", b"TAG", b"APETAGEX")


class UndecodableError(ValueError):
    """No decoder reads the file, or it holds no audio; `reason` is one line without the path."""

    def __init__(self, path: str, reason: str):
        super().__init__(f"{path}: {reason}")
        self.reason = reason


class DecoderDiedError(OSError):
    """Decoding processes die on one file after another, for example for lack of memory."""


class Recording(NamedTuple):
    """The sound of an audio file.

    Attributes:
      samples: int16 [samples], 16 kHz, at least one sample.
      remarks: what the samples lack or how they were changed, each "KIND: DETAIL".
    """

    samples: np.ndarray
    remarks: tuple[str, ...] = ()


# --- one file or array ------------------------------------------------------------------------


def decode(path: str | os.PathLike) -> Recording:
    """Decodes an audio file, or the first audio stream of a video file.

    libsndfile (soundfile) reads PCM and FLAC, FFmpeg (PyAV) everything else, and each reads what
    the other cannot. Other rates are resampled (soxr HQ). A 16-bit mono file at 16 kHz comes back
    bit for bit. The file is read in blocks: only the int16 result is ever in memory at its full
    length. A file whose channels cancel is read a second time, for one of them.

    Raises:
      UndecodableError: the path is not a file, both decoders fail, or there are no samples or
        samples that are not audio.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise UndecodableError(path, "is not a file" if os.path.exists(path) else "not found")
    try:
        with open(path, "rb") as file:
            is_lossless = bool(_LOSSLESS.match(file.read(12)))
        goes_on = is_lossless and _goes_on(path)
    except OSError as error:
        raise UndecodableError(path, terminal.one_line(error)) from error
    decoders = [
        ("PyAV", functools.partial(_av_blocks, ignore_length=goes_on)),
        ("soundfile", _soundfile_blocks),
    ]
    reasons = []
    for decoder, read_blocks in reversed(decoders) if is_lossless and not goes_on else decoders:
        # Where FFmpeg comes first, a file that libsndfile alone reads is not damaged but rare.
        remarks = [f"read by {decoder}: {reason}" for reason in reasons if is_lossless]
        if goes_on:
            remarks.append("longer than its header counts: read to the end")
        try:
            samples = _mono_int16(functools.partial(read_blocks, path, remarks), remarks)
            if not len(samples):
                raise ValueError("no samples")
            return Recording(samples, tuple(dict.fromkeys(remarks)))  # said once per reading
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
      waveform: [samples] or [samples, channels], as `fbank.as_samples` takes them.
      sample_rate_hz: rate of `waveform`.

    Returns:
      int16 [samples], 16 kHz.

    Raises:
      ValueError: no samples, or another shape, type or values.
    """
    waveform = np.asarray(waveform)
    if waveform.ndim not in (1, 2) or not waveform.size:
        raise ValueError(
            f"audio of shape {list(waveform.shape)}, expected [samples] or [samples, channels] with"
            " at least one sample"
        )
    waveform = as_samples(waveform)
    if waveform.dtype == np.int16:
        if waveform.ndim == 1 and sample_rate_hz == SAMPLE_RATE_HZ:
            return waveform
        waveform = waveform.astype(np.float32) / FULL_SCALE
    channels_last = waveform[:, None] if waveform.ndim == 1 else waveform
    return _mono_int16(lambda: [(channels_last, sample_rate_hz)], [])


def has_sound(samples: np.ndarray) -> bool:
    """Whether not all samples are equal."""
    return samples.min() < samples.max()


Blocks = Iterable[tuple[np.ndarray, int]]  # float32 [samples, channels], rate in Hz


def _mono_int16(read_blocks: Callable[[], Blocks], remarks: list[str]) -> np.ndarray:
    """Returns int16 [samples] at 16 kHz of the blocks, which it reads again if channels cancel."""
    samples, peak, alone = _read(read_blocks(), {})
    if alone:
        remarks += [f"channels cancel: channel {taken + 1} alone" for taken in alone.values()]
        samples, peak, _ = _read(read_blocks(), alone)
    if peak > _OVERSHOOT:
        remarks.append(f"beyond full scale: scaled down from a peak of {peak:.4g}")
    return samples


def _read(blocks: Blocks, alone: Mapping[int, int]) -> tuple[np.ndarray, float, dict[int, int]]:
    """Reads blocks to int16 [samples] at 16 kHz.

    A stretch is a run of blocks of one rate and one number of channels. Most files are one.

    Args:
      alone: per stretch, the channel that is taken in place of the mean.

    Returns:
      The samples, the peak that they are scaled down from (1 if they are not), and `alone` for the
      stretches whose channels cancel.
    """
    pieces, peak, cancelling = [(np.zeros(0, np.int16), 1.0)], 1.0, {}
    stretches = itertools.groupby(blocks, lambda block: (block[1], block[0].shape[1]))
    for number, ((rate_hz, num_channels), stretch) in enumerate(stretches):
        products = np.zeros((num_channels, num_channels))
        for mono in _resampled(_mono(stretch, alone.get(number), products), rate_hz):
            peak = max(peak, float(np.abs(mono).max(initial=0)))
            pieces.append((_int16(mono * np.float32(FULL_SCALE / peak)), peak))
        powers = products.diagonal()
        # The mean of all products is the power of the mean.
        if products.mean() < _LEAST_MEAN_POWER * powers.mean():
            cancelling[number] = int(powers.argmax())
    # Pieces from before the greatest peak are scaled once more, to the one scale of the file.
    same_scale = [
        piece if own == peak else _int16(piece * np.float32(own / peak)) for piece, own in pieces
    ]
    return np.concatenate(same_scale), peak, cancelling


def _int16(samples: np.ndarray) -> np.ndarray:
    # Only a sample of +1 is a step too large.
    return np.rint(samples).clip(-FULL_SCALE, FULL_SCALE - 1).astype(np.int16)


def _mono(stretch: Iterator, channel: int | None, products: np.ndarray) -> Iterator[np.ndarray]:
    """Yields float32 [samples] per block; adds up `products` of the channels, [channels, channels].

    They are left at 0 where there is no mean: for a single channel, and one that is taken alone.
    """
    while blocks := [block for block, _ in itertools.islice(stretch, _BLOCKS_AT_ONCE)]:
        block = np.concatenate(blocks)
        check_peak(np.abs(block).max(initial=0))
        if block.shape[1] == 1 or channel is not None:
            yield block[:, channel or 0]
        else:
            products += block.T @ block
            yield block.mean(axis=1)


def _resampled(blocks: Iterator[np.ndarray], rate_hz: int) -> Iterator[np.ndarray]:
    if rate_hz == SAMPLE_RATE_HZ:
        yield from blocks
        return
    import soxr

    resampler = soxr.ResampleStream(rate_hz, SAMPLE_RATE_HZ, 1, dtype="float32", quality="HQ")
    for mono in blocks:
        yield resampler.resample_chunk(mono)
    yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)


def _soundfile_blocks(path: str, remarks: list[str]) -> Blocks:
    import soundfile

    with soundfile.SoundFile(path) as file:
        if shortened := _SHORTENED.search(file.extra_info):
            counted, held = map(int, shortened.groups())
            if counted < _UNKNOWN_BYTES:
                remarks.append(f"read in part: {held} of {counted} bytes that its header counts")
        while len(block := file.read(_BLOCK_FRAMES, dtype="float32", always_2d=True)):
            yield block, file.samplerate


def _goes_on(path: str) -> bool:
    """Whether a RIFF or FLAC file goes on after the sound that its header counts."""
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        if content[:4] == b"fLaC":
            return bool(_FLAC_START.search(content, 4))
        place, is_past_sound = 12, False
        while content[:4] == b"RIFF" and place + 8 <= len(content):
            if is_past_sound and not _CHUNK_NAME.match(content, place):
                return bool(_NOT_ZERO.search(content, place))
            name, num_bytes = struct.unpack_from("<4sI", content, place)
            is_past_sound |= name == b"data"
            place += 8 + num_bytes + num_bytes % 2
    return False


def _av_blocks(path: str, remarks: list[str], ignore_length: bool) -> Blocks:
    import av

    options = {
        # The list of protocols keeps a playlist that poses as audio from fetching anything.
        "protocol_whitelist": "file",
        "ignore_length": str(int(ignore_length)),  # known for RIFF alone
    }
    # "file:" keeps FFmpeg from reading a colon in the name as a protocol.
    with av.open(f"file:{path}", metadata_errors="ignore", options=options) as container:
        if not container.streams.audio:
            raise ValueError("no audio stream")
        stream = container.streams.audio[0]
        seconds, num_damaged, end = 0.0, 0, ""
        try:
            for packet in container.demux(stream):
                try:
                    frames = packet.decode()
                except av.InvalidDataError:
                    num_damaged += not bytes(packet).startswith(_TAGS)
                    continue
                for frame in frames:
                    seconds += frame.samples / frame.sample_rate
                    yield _frame_samples(frame), frame.sample_rate
        except (av.InvalidDataError, av.PatchWelcomeError) as error:
            if not seconds:
                raise
            end = f", where FFmpeg stops: {terminal.one_line(error)}"
        counted = _counted_seconds(container.format.name, stream)
        if num_damaged or end or seconds < 0.99 * counted - 0.1:
            of = f" of {counted:.2f}" if counted else ""
            remarks.append(f"read in part: {seconds:.2f}{of} s, {num_damaged} packets damaged{end}")


def _counted_seconds(format_name: str, stream) -> float:
    """Returns the seconds that a file's header counts, 0 where it counts none."""
    # An mp3 file with a first frame that counts the others also states the encoder's delay.
    is_counted = format_name in _COUNTING or (format_name == "mp3" and stream.start_time)
    return float(stream.duration * stream.time_base) if is_counted and stream.duration else 0.0


def _frame_samples(frame) -> np.ndarray:
    """float32 [samples, channels] of a frame in any of FFmpeg's sample formats."""
    values = frame.to_ndarray()
    # A planar frame is [channels, samples], a packed frame [1, samples * channels].
    block = values.T if frame.format.is_planar else values.reshape(frame.samples, -1)
    if block.dtype == np.uint8:
        return (block.astype(np.float32) - 128) / 128
    if np.issubdtype(block.dtype, np.integer):
        return block.astype(np.float32) / 2 ** (8 * block.itemsize - 1)
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

    def decode(self, paths: Sequence[str]) -> Iterator[Recording | str]:
        """Yields for each path, in order, its recording, or why it is undecodable.

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

    def _result(self, path: str, future: concurrent.futures.Future) -> Recording | str:
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


def _decode(path: str) -> Recording | str:
    """What a decoding process runs."""
    try:
        return decode(path)
    except UndecodableError as error:
        return error.reason
    except MemoryError:
        os._exit(1)  # As if killed: decoded alone, the file may fit into memory.


def _follow_parent() -> None:
    """Runs first in a decoding process, which would outlive a killed parent and wait for ever."""
    # C libraries write warnings here that name no file. Python's own errors still appear.
    sys.stderr = os.fdopen(os.dup(2), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent handles Ctrl-C and ends this process.

    def wait_and_exit():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait_and_exit, daemon=True).start()
