"""Embeds audio files with a pretrained encoder.

  python -m maeast_jax.embed FILE... --checkpoint=CKPT --output=FILE.npz|FILE.parquet

FILE is an audio or video file of any format and length, or a folder of such files at any depth. The
program reports a file that it cannot read, embeds the others and ends with exit code 4. It also
reports files that it read in part, scaled down, or found without sound, and embeds them. The output
appears once it is whole. maeast_jax/inference/embedding_file.py describes its content, and the last
line that the program prints reads it.
"""

import inspect
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags
from tqdm import tqdm

from maeast_jax.data import DecodePool, Outcome, files, num_cores
from maeast_jax.ingest import sources
from maeast_jax.runtime import cli, terminal

if TYPE_CHECKING:  # Each decoding process imports this file, and does not need jax.
    from maeast_jax.inference import Embedder


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
    from maeast_jax.inference import Embedder, batching, embedding_file, pretrained
    from maeast_jax.runtime import memory

    output = Path(output).expanduser()
    embedding_file.check(output, overwrite)
    paths, notes = sources.list_named(paths)
    source = pretrained.read(checkpoint)
    patch_frames, _ = source.config.patch_shape
    embedder = Embedder(
        source.model(dtype),
        pool=pool,
        layer=layer,
        window_frames=batching.whole_tokens("--window_seconds", window_seconds, patch_frames),
        stride_frames=batching.whole_tokens("--stride_seconds", stride_seconds, patch_frames),
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
        "window_seconds": embedder.window_frames / batching.FRAMES_PER_SECOND,
        "stride_seconds": embedder.stride_frames / batching.FRAMES_PER_SECOND,
    }
    plan = _plan(len(paths), notes, embedder, settings, output)
    print(terminal.announce(plan), flush=True)
    outcome = Outcome()
    start = time.monotonic()
    with (
        memory.out_of_memory("pass a smaller --batch_tokens or --window_seconds"),
        embedding_file.open_writer(output, embedder.axes, settings) as writer,
        DecodePool(min(num_processes or num_cores(), len(paths))) as decode_pool,
        tqdm(total=len(paths), unit="file") as bar,
    ):
        clips = files.decoded(paths, decode_pool, outcome, bar)
        for index, embedding in enumerate(embedder(clips)):
            writer.add(outcome.done[index], embedding)
            bar.update()
        settings |= {"failed": outcome.failed, "remarks": outcome.remarks}
    summary = outcome.summary("embedded", time.monotonic() - start)
    summary["output"] = str(output) if outcome.done else "none: no file could be read"
    if outcome.done:
        summary["read it"] = embedding_file.how_to_read(output, embedder.axes)
    print(terminal.announce(summary), flush=True)
    return outcome


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
        "A run's workdir, WORKDIR/checkpoints/STEP, a .pt or .safetensors file, an exported folder,"
        " or hf://ORG/NAME.",
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
    return cli.EXIT_INCOMPLETE if outcome.failed else 0


if __name__ == "__main__":
    _define_flags()
    cli.run_flags(main, required=("checkpoint", "output"))
