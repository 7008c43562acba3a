"""python -m benchmarks.fidelity [FILE...]: a table of how far our hidden states are from s3prl's.

The models have base size, random weights and compute in float32, once with patches and once with
frames; --checkpoint=FILE.pt takes the weights of a file. The audio files, cut to 10 s, are one
batch; without files, clips of the demo corpus are. Needs requirements-test.txt and
requirements-reference.txt.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import reference
from maeast_jax import fbank
from maeast_jax.data import audio, demo_corpus
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
    ours = model.encode(*batch(clips))
    theirs, padding = reference.hidden_states(expert, clips)
    if not np.array_equal(ours.padding, padding):
        raise ValueError("the two models take different tokens for padding")
    return [
        Deviation(float(np.abs(a - b)[~padding].max()), float(np.abs(b)[~padding].max()))
        for a, b in zip(np.asarray(ours.hidden_states), theirs, strict=True)
    ]


def table(columns: dict[str, list[Deviation]]) -> str:
    """Returns a Markdown table with one row per layer and two columns per model."""
    names = [f"{name}, greatest | {name}, relative" for name in columns]
    lines = [f"| layer | {' | '.join(names)} |", "|---" * (1 + 2 * len(columns)) + "|"]
    for layer, row in enumerate(zip(*columns.values(), strict=True), start=1):
        cells = [f"{deviation.greatest:.1e} | {deviation.relative:.1e}" for deviation in row]
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
            columns = {options.checkpoint.stem: _deviations_of(options.checkpoint, clips)}
        else:
            columns = {}
            for tokens in ("patch", "frame"):
                with tempfile.TemporaryDirectory() as folder:
                    path = reference.make_checkpoint(Path(folder) / "base.pt", tokens=tokens)
                    columns[tokens] = _deviations_of(path, clips)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    seconds = ", ".join(f"{len(clip) / fbank.SAMPLE_RATE_HZ:.2f}" for clip in clips)
    print(f"Clips of {seconds} s in one batch, float32.\n\n{table(columns)}")


def _deviations_of(path: Path, clips: Sequence[np.ndarray]) -> list[Deviation]:
    return deviations(pretrained.load(path), reference.expert(path), clips)


if __name__ == "__main__":
    main()
