"""Embeds audio files with a pretrained encoder.

  python -m maeast_jax.embed FILE... --checkpoint=CKPT --output=FILE.npz|FILE.parquet

FILE is an audio or video file of any format and length, or a folder of such at any depth. One that
cannot be read is reported, the others are embedded, and the exit code is 4. The output appears once
it is whole; maeast_jax/inference/embedding_file.py says what it holds, and the last line that is
printed says how to read it.
"""

import dataclasses
import inspect
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags
from tqdm import tqdm

from maeast_jax.data import DecodePool, audio, num_cores

# What starts jax is imported where it is used: each decoding process imports this file.
from maeast_jax.inference import embedding_file
from maeast_jax.ingest import sources
from maeast_jax.runtime import cli, memory, terminal

if TYPE_CHECKING:
    from maeast_jax.inference import Embedder

EXIT_INCOMPLETE = 4

_POOLS = ("mean", "time", "moments", "none")
_SHORTEST_SECONDS = 0.025  # a frame
_FRAMES_PER_SECOND = 100


@dataclasses.dataclass
class Outcome:
    """What became of the files.

    Attributes:
      done: names of those in the output, in its order.
      failed: why, by name, of the others.
      num_samples: of the former, at 16 kHz.
    """

    done: list[str] = dataclasses.field(default_factory=list)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    num_samples: int = 0


def embed(
    paths: Sequence[str | os.PathLike],
    *,
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    pool: str = "mean",
    layer: int | str = -1,
    window_seconds: float | None = None,
    stride_seconds: float | None = None,
    dtype: str = "float32",
    batch_tokens: int | None = None,
    num_processes: int | None = None,
    overwrite: bool = False,
) -> Outcome:
    """Embeds files and folders of files into `output`; the arguments are the program's flags.

    Where no file can be read, nothing is written.

    Raises:
      ValueError: one line, before any file is decoded. OSError: nothing was written.
    """
    output = Path(output).expanduser()
    embedding_file.check(output, overwrite)
    files = sources.list_named(paths)
    if num_processes is not None and num_processes < 1:
        raise ValueError(f"--num_processes={num_processes} must be at least 1")
    num_processes = min(num_processes or num_cores(), len(files))

    from maeast_jax.inference import Embedder, pretrained

    source = pretrained.read(checkpoint)
    window_frames, stride_frames = _window(
        window_seconds, stride_seconds, source.config.patch_shape[0], source.window_frames
    )
    embedder = Embedder(
        source.model(dtype), pool=pool, layer=_layer(layer), window_frames=window_frames,
        stride_frames=stride_frames, batch_tokens=batch_tokens,
    )  # fmt: skip
    settings = {
        "checkpoint": source.path,
        "tokens": source.config.tokens,
        "dtype": dtype,
        "pool": pool,
        "layer": embedder.layer,
        "axes": embedder.axes,
        "step_seconds": embedder.step_seconds,
        "window_seconds": window_frames / _FRAMES_PER_SECOND,
        "stride_seconds": stride_frames / _FRAMES_PER_SECOND,
    }
    print(terminal.announce(_plan(len(files), embedder, settings, output)), flush=True)
    outcome = Outcome()
    start = time.monotonic()
    with (
        memory.out_of_memory("pass a smaller --batch_tokens or --window_seconds"),
        embedding_file.open_writer(output, embedder.axes, settings) as writer,
        DecodePool(num_processes) as decode_pool,
        tqdm(total=len(files), unit="file") as bar,
    ):
        clips = _decoded(files, decode_pool, outcome, bar)
        for index, embedding in enumerate(embedder(clips)):
            writer.add(outcome.done[index], embedding)
            bar.update()
        settings["failed"] = outcome.failed
    seconds = time.monotonic() - start
    print(terminal.announce(_summary(outcome, seconds, output, embedder.axes)), flush=True)
    return outcome


def _decoded(
    files: list[str], decode_pool: DecodePool, outcome: Outcome, bar: tqdm
) -> Iterator[np.ndarray]:
    """Yields the samples of the files that can be embedded, and reports the others."""
    for file, samples in zip(files, decode_pool.decode(files), strict=True):
        # File names are arbitrary bytes; UTF-8 is not.
        name = file.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        if isinstance(samples, str):
            reason = samples
        elif len(samples) < _SHORTEST_SECONDS * audio.SAMPLE_RATE_HZ:
            reason = f"{len(samples)} samples at 16 kHz, shorter than 25 ms"
        else:
            outcome.done.append(name)
            outcome.num_samples += len(samples)
            yield samples
            continue
        outcome.failed[name] = reason
        bar.write(f"{name}: {reason}", file=sys.stderr)
        bar.update()


def _layer(text: int | str) -> int | str:
    try:
        return int(text)
    except ValueError:
        if text == "all":
            return text
        raise ValueError(f"--layer={text} must be a number or all") from None


def _window(
    window_seconds: float | None,
    stride_seconds: float | None,
    patch_frames: int,
    default_frames: int,
) -> tuple[int, int]:
    """Frames of window and stride, rounded down to whole tokens; without cutting, 0 and 0."""

    def frames(name: str, seconds: float) -> int:
        # 10.24 * 100 need not be 1024.
        steps = int(seconds * _FRAMES_PER_SECOND + 1e-6) // patch_frames
        if steps < 1:
            raise ValueError(
                f"--{name}={seconds:g} must be at least {patch_frames / _FRAMES_PER_SECOND:g}, "
                "the length of a token"
            )
        return steps * patch_frames

    if window_seconds is None:
        window_seconds = default_frames / _FRAMES_PER_SECOND
    if not 0 <= window_seconds < float("inf"):
        raise ValueError(f"--window_seconds={window_seconds:g} must be 0 (never cut) or more")
    if not window_seconds:
        if stride_seconds is not None:
            raise ValueError(
                f"--stride_seconds={stride_seconds:g} is for windows, and --window_seconds=0 has "
                "none: drop either"
            )
        return 0, 0
    stride_seconds = window_seconds if stride_seconds is None else stride_seconds
    if not 0 < stride_seconds <= window_seconds:
        raise ValueError(
            f"--stride_seconds={stride_seconds:g} must be above 0 and at most the window, "
            f"{window_seconds:g}: a longer one would leave audio out"
        )
    return frames("window_seconds", window_seconds), frames("stride_seconds", stride_seconds)


# --- what is told ----------------------------------------------------------------------------


def _plan(
    num_files: int, embedder: "Embedder", settings: dict[str, Any], output: Path
) -> dict[str, str]:
    sizes = {"layers": embedder.num_layers, "steps": "steps", "size": embedder.embedding_size}
    shape = ", ".join(str(sizes[axis]) for axis in embedder.axes)
    step = f"steps of {embedder.step_seconds:g} s"
    pooled = {
        "mean": "mean over time and bands", "time": "mean over time", "none": step,
        "moments": "mean and deviation over time",
    }  # fmt: skip
    layers = "all layers"
    if embedder.layer != "all":
        layers = f"layer {embedder.layer} (0 to {embedder.num_layers - 1})"
    window = f"{settings['window_seconds']:g} s every {settings['stride_seconds']:g} s"
    return {
        "files": str(num_files),
        "checkpoint": settings["checkpoint"],
        "model": f"{settings['tokens']} tokens, {embedder.num_layers} layers, {settings['dtype']}",
        "windows": window if settings["window_seconds"] else "none: files are never cut",
        "embedding": f"[{shape}] a file: {pooled[embedder.pool]} of {layers}",
        "output": str(output),
    }


def _summary(
    outcome: Outcome, seconds: float, output: Path, axes: tuple[str, ...]
) -> dict[str, str]:
    audio_seconds = outcome.num_samples / audio.SAMPLE_RATE_HZ
    hours = f"{audio_seconds / 3600:.3f} h of audio in {seconds:.1f} s"
    lines = {
        "embedded": f"{len(outcome.done)} files, {hours}",
        "failed": f"{len(outcome.failed)} file{'' if len(outcome.failed) == 1 else 's'}",
    }
    if not outcome.done:
        return lines | {"output": "none: no file could be read"}
    return lines | {"output": str(output), "read it": embedding_file.how_to_read(output, axes)}


# --- command line ----------------------------------------------------------------------------


def _define_flags() -> None:
    flags.DEFINE_string(
        "checkpoint",
        None,
        "A run's workdir, WORKDIR/checkpoints/STEP, or a .pt or .safetensors file.",
    )
    flags.DEFINE_string("output", None, "FILE.npz, or FILE.parquet, which is not kept in memory.")
    flags.DEFINE_enum(
        "pool",
        "mean",
        _POOLS,
        "mean: over all tokens; time: over time, the bands side by side; moments: that, and the"
        " deviation over time; none: every time step.",
    )
    flags.DEFINE_string("layer", "-1", "0 to the last, negative ones from the end, or all.")
    flags.DEFINE_float(
        "window_seconds",
        None,
        "Longer files are cut into windows; 0: never. Default: the clips that the checkpoint was"
        " trained on. Rounded down to whole tokens, as the stride.",
    )
    flags.DEFINE_float(
        "stride_seconds",
        None,
        "From one window to the next. Default: the window. Where windows overlap, each moment is"
        " taken from the one whose middle is nearest.",
    )
    flags.DEFINE_enum("dtype", "float32", ("float32", "bfloat16"), "What the model computes in.")
    flags.DEFINE_integer("batch_tokens", None, "Tokens a batch. Default: 1024 on CPU, else 16384.")
    flags.DEFINE_integer("num_processes", None, "Processes that decode. Default: one a core.")
    flags.DEFINE_bool("overwrite", False, "Replace the output, once done.")
    flags.FLAGS.set_gnu_getopt()  # flags may follow files


def main(arguments: list[str]) -> int:
    names = [name for name in inspect.signature(embed).parameters if name != "paths"]
    outcome = embed(arguments, **{name: flags.FLAGS[name].value for name in names})
    return EXIT_INCOMPLETE if outcome.failed else 0


if __name__ == "__main__":
    _define_flags()
    cli.run_flags(main, required=("checkpoint", "output"))
