"""python -m benchmarks.fidelity [FILE...]: a table of how far our hidden states are from s3prl's.

"maeast_jax" is the model in JAX, "transformers" the same exported and loaded by transformers. The
models have base size, random weights and compute in float32, once with patches and once with
frames; --checkpoint=FILE.pt takes the weights of a file. The audio files, cut to 10 s, are one
batch; without files, clips of the demo corpus are. Needs requirements-test.txt and
requirements-reference.txt.
"""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import reference
from maeast_jax import fbank
from maeast_jax.data import audio, demo_corpus
from maeast_jax.export import export
from maeast_jax.inference import pretrained

LONGEST_SAMPLES = 10 * fbank.SAMPLE_RATE_HZ
# Samples of the demo clips: 28 to 248 frames, most of them no multiple of a token's frames.
DEMO_SAMPLES = (4_801, 11_000, 17_777, 25_000, 40_000)


class Deviation(NamedTuple):
    """The greatest difference and the largest value of one layer's hidden states at real tokens."""

    greatest: float
    largest: float

    @property
    def relative(self) -> float:
        return self.greatest / self.largest


def batch(clips: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns clips padded to the longest, [b, samples], and their lengths, int32 [b]."""
    lengths = np.array([len(clip) for clip in clips], np.int32)
    return np.stack([np.pad(clip, (0, lengths.max() - len(clip))) for clip in clips]), lengths


def deviations(model, expert, clips: Sequence[np.ndarray]) -> list[Deviation]:
    """Returns the deviation of `model` (MaeAst) from `expert` (s3prl's) per layer, for one batch.

    The clips are float32 [samples]. Raises ValueError if the two take different tokens for padding.
    """
    return compare(model.encode(*batch(clips)), reference.hidden_states(expert, clips))


def compare(ours, theirs) -> list[Deviation]:
    """Returns the deviation per layer of two pairs (hidden states [L, b, N, D], padding [b, N]).

    Raises ValueError if the two take different tokens for padding.
    """
    (states, padding), (wanted, wanted_padding) = ours, theirs
    real = ~np.asarray(padding)
    if not np.array_equal(real, ~wanted_padding):
        raise ValueError("the two models take different tokens for padding")
    return [
        Deviation(float(np.abs(a - b)[real].max()), float(np.abs(b)[real].max()))
        for a, b in zip(np.asarray(states), wanted, strict=True)
    ]


def table(columns: dict[str, list[Deviation]]) -> str:
    """Returns a Markdown table of relative deviations, one row per layer, one column per model."""
    lines = [f"| layer | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for layer, row in enumerate(zip(*columns.values(), strict=True), start=1):
        cells = [f"{deviation.relative:.1e}" for deviation in row]
        lines.append(f"| {layer} | {' | '.join(cells)} |")
    return "\n".join(lines)


def read_clips(files: Sequence[Path]) -> list[np.ndarray]:
    """Returns float32 clips of at most 10 s of the files, or of the demo corpus."""
    if files:
        clips = [audio.decode(file).samples[:LONGEST_SAMPLES] for file in files]
    else:
        families = zip(demo_corpus.FAMILIES, DEMO_SAMPLES, strict=False)
        clips = [demo_corpus.clip(family, 0)[:samples] for family, samples in families]
    return [np.float32(clip) / 32_768 for clip in clips]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="audio files")
    parser.add_argument("--checkpoint", type=Path, help="a .pt of the authors' layout")
    options = parser.parse_args(arguments)
    try:
        clips = read_clips(options.files)
        if options.checkpoint:
            columns = _columns(options.checkpoint, clips)
        else:
            columns = {}
            for tokens in ("patch", "frame"):
                with tempfile.TemporaryDirectory() as folder:
                    path = reference.make_checkpoint(Path(folder) / "base.pt", tokens=tokens)
                    columns |= {f"{tokens}, {k}": v for k, v in _columns(path, clips).items()}
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    seconds = ", ".join(f"{len(clip) / fbank.SAMPLE_RATE_HZ:.2f}" for clip in clips)
    print(f"Clips of {seconds} s in one batch, float32.\n\n{table(columns)}")


def _columns(path: Path, clips: Sequence[np.ndarray]) -> dict[str, list[Deviation]]:
    theirs = reference.hidden_states(reference.expert(path), clips)
    ours = pretrained.load(path).encode(*batch(clips))
    columns = {"maeast_jax": compare(ours, theirs)}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        export(path, Path(folder) / "exported", folder_format="transformers")
        exported = reference.transformers_hidden_states(Path(folder) / "exported", clips)
    return columns | {"transformers": compare(exported, theirs)}


if __name__ == "__main__":
    main()
