"""Embeds audio files with a pretrained encoder.

  python -m maeast_jax.embed FILE... --checkpoint=CKPT --output=FILE.npz|FILE.parquet

FILE is an audio or video file of any format and length, or a folder of such files at any depth. The
program reports a file that it cannot read, embeds the others and ends with exit code 4. It also
reports files that it read in part, scaled down, or found without sound, and embeds them. The output
appears once it is whole. maeast_jax/inference/embedding_file.py describes its content, and the last
line that the program prints reads it.
"""

import dataclasses
import inspect
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags
from tqdm import tqdm

from maeast_jax import fbank
from maeast_jax.data import DecodePool, has_sound, num_cores
from maeast_jax.ingest import sources
from maeast_jax.runtime import cli, terminal

if TYPE_CHECKING:  # Each decoding process imports this file, and does not need jax.
    from maeast_jax.inference import Embedder

EXIT_INCOMPLETE = 4

_FRAMES_PER_SECOND = 100


@dataclasses.dataclass
class Outcome:
    """What became of the files.

    Attributes:
      done: names of the embedded files, in the order of the output.
      failed: the reason per file that is not embedded, by name.
      remarks: what is unusual about an embedded file, by name.
      num_samples: samples in the embedded files, at 16 kHz.
    """

    done: list[str] = dataclasses.field(default_factory=list)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    remarks: dict[str, str] = dataclasses.field(default_factory=dict)
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

    If no file can be read, nothing is written.

    Raises:
      ValueError: one line, before any file is decoded.
      OSError: the output cannot be written; nothing of it is left.
    """
    from maeast_jax.inference import Embedder, embedding_file, pretrained
    from maeast_jax.runtime import memory

    output = Path(output).expanduser()
    embedding_file.check(output, overwrite)
    files, notes = sources.list_named(paths)
    source = pretrained.read(checkpoint)
    patch_frames, _ = source.config.patch_shape
    embedder = Embedder(
        source.model(dtype),
        pool=pool,
        layer=layer,
        window_frames=_whole_tokens("window_seconds", window_seconds, patch_frames),
        stride_frames=_whole_tokens("stride_seconds", stride_seconds, patch_frames),
        batch_tokens=batch_tokens,
    )
    settings = {
        "checkpoint": source.path,
        "tokens": source.config.tokens,
        "dtype": dtype,
        "pool": pool,
        "layer": embedder.layer,
        "axes": embedder.axes,
        "step_seconds": embedder.step_seconds,
        "window_seconds": embedder.window_frames / _FRAMES_PER_SECOND,
        "stride_seconds": embedder.stride_frames / _FRAMES_PER_SECOND,
    }
    plan = _plan(len(files), notes, embedder, settings, output)
    print(terminal.announce(plan), flush=True)
    outcome = Outcome()
    start = time.monotonic()
    with (
        memory.out_of_memory("pass a smaller --batch_tokens or --window_seconds"),
        embedding_file.open_writer(output, embedder.axes, settings) as writer,
        DecodePool(min(num_processes or num_cores(), len(files))) as decode_pool,
        tqdm(total=len(files), unit="file") as bar,
    ):
        clips = _decoded(files, decode_pool, outcome, bar)
        for index, embedding in enumerate(embedder(clips)):
            writer.add(outcome.done[index], embedding)
            bar.update()
        settings |= {"failed": outcome.failed, "remarks": outcome.remarks}
    hours = outcome.num_samples / fbank.SAMPLE_RATE_HZ / 3600
    summary = {
        "embedded": f"{len(outcome.done)} files, {hours:.3f} h of audio in "
        f"{time.monotonic() - start:.1f} s",
        "failed": str(len(outcome.failed)),
        **({"remarks": f"on {len(outcome.remarks)} files"} if outcome.remarks else {}),
        "output": str(output) if outcome.done else "none: no file could be read",
    }
    if outcome.done:
        summary["read it"] = embedding_file.how_to_read(output, embedder.axes)
    print(terminal.announce(summary), flush=True)
    return outcome


def _decoded(
    files: list[str], decode_pool: DecodePool, outcome: Outcome, bar: tqdm
) -> Iterator[np.ndarray]:
    """Yields the samples of the files that can be embedded, and reports what is unusual."""
    for file, decoded in zip(files, decode_pool.decode(files), strict=True):
        # File names are arbitrary bytes, but the output holds UTF-8.
        name = os.fsencode(file).decode("utf-8", "backslashreplace")
        if isinstance(decoded, str):
            outcome.failed[name] = decoded
        elif len(decoded.samples) < fbank.FRAME_LENGTH:
            outcome.failed[name] = f"{len(decoded.samples)} samples at 16 kHz, shorter than 25 ms"
        else:
            remarks = [*decoded.remarks, *([] if has_sound(decoded.samples) else ["no sound"])]
            if remarks:
                outcome.remarks[name] = "; ".join(remarks)
            outcome.done.append(name)
            outcome.num_samples += len(decoded.samples)
        if told := outcome.failed.get(name) or outcome.remarks.get(name):
            bar.write(f"{name}: {told}", file=sys.stderr)
        if name in outcome.failed:
            bar.update()
        else:
            yield decoded.samples


def _whole_tokens(flag: str, seconds: float | None, patch_frames: int) -> int | None:
    """Returns the frames in so many seconds, rounded down to whole tokens."""
    if seconds is None:
        return None
    token_seconds = patch_frames / _FRAMES_PER_SECOND
    if seconds and not token_seconds <= seconds < math.inf:  # 0 stands for uncut files
        raise ValueError(
            f"--{flag}={seconds:g} must be at least {token_seconds:g}, the length of a token"
        )
    return int(seconds / token_seconds + 1e-6) * patch_frames  # 10.24 * 100 < 1024


def _plan(
    num_files: int,
    notes: list[str],
    embedder: "Embedder",
    settings: dict[str, Any],
    output: Path,
) -> dict[str, str]:
    sizes = {"layers": embedder.num_layers, "steps": "steps", "size": embedder.embedding_size}
    shape = ", ".join(str(sizes[axis]) for axis in embedder.axes)
    pooled = {
        "mean": "mean over time and bands",
        "time": "mean over time",
        "moments": "mean and deviation over time",
        "none": f"steps of {embedder.step_seconds:g} s",
    }
    layers = "all layers"
    if embedder.layer != "all":
        layers = f"layer {embedder.layer} (0 to {embedder.num_layers - 1})"
    window = f"{settings['window_seconds']:g} s every {settings['stride_seconds']:g} s"
    return {
        "files": "\n".join([str(num_files), *notes]),
        "checkpoint": settings["checkpoint"],
        "model": f"{settings['tokens']} tokens, {embedder.num_layers} layers, {settings['dtype']}",
        "windows": window if embedder.window_frames else "none: files are never cut",
        "embedding": f"[{shape}] per file: {pooled[embedder.pool]} of {layers}",
        "output": str(output),
    }


def _define_flags() -> None:
    from maeast_jax.inference import POOLS

    flags.DEFINE_string(
        "checkpoint",
        None,
        "A run's workdir, WORKDIR/checkpoints/STEP, or a .pt or .safetensors file.",
    )
    flags.DEFINE_string("output", None, "FILE.npz, or FILE.parquet, which needs little memory.")
    flags.DEFINE_enum(
        "pool",
        "mean",
        POOLS,
        "mean: over all tokens; time: over time, with the bands side by side; moments: mean and"
        " deviation over time; none: every time step.",
    )
    flags.DEFINE_string("layer", "-1", "0 to the last, negative ones from the end, or all.")
    flags.DEFINE_float(
        "window_seconds",
        None,
        "Longer files are cut into windows; 0: never. Default: the length of the clips that the"
        " checkpoint was trained on. Rounded down to whole tokens, like the stride.",
    )
    flags.DEFINE_float(
        "stride_seconds",
        None,
        "Time from one window to the next. Default: the window. Where windows overlap, each moment"
        " is taken from the window with the nearest middle.",
    )
    flags.DEFINE_enum("dtype", "float32", ("float32", "bfloat16"), "Type of the computation.")
    flags.DEFINE_integer(
        "batch_tokens",
        None,
        "Tokens per batch. Default: 1024 on a CPU, 16384 elsewhere.",
        lower_bound=1,
    )
    flags.DEFINE_integer(
        "num_processes", None, "Processes that decode. Default: one per core.", lower_bound=1
    )
    flags.DEFINE_bool("overwrite", False, "Replace the output when the new one is complete.")
    flags.FLAGS.set_gnu_getopt()  # flags may follow files


def main(arguments: list[str]) -> int:
    names = [name for name in inspect.signature(embed).parameters if name != "paths"]
    outcome = embed(arguments, **{name: flags.FLAGS[name].value for name in names})
    return EXIT_INCOMPLETE if outcome.failed else 0


if __name__ == "__main__":
    _define_flags()
    cli.run_flags(main, required=("checkpoint", "output"))
