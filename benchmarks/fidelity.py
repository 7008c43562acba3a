"""python -m benchmarks.fidelity [FILE...]: our hidden states against s3prl's, a table by layer.

Base size, float32, one batch of the audio files given (cut to 10 s; clips of the embedded corpus
where none is), patches and frames, random weights; or the weights of --checkpoint=FILE.pt. Needs
what requirements-test.txt and requirements-reference.txt name.
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
# Samples of the embedded clips: 28 to 248 frames, most of them no multiple of a token's.
DEMO_SAMPLES = (4_801, 11_000, 17_777, 25_000, 40_000)


class Deviation(NamedTuple):
    """Of one layer's hidden states at real tokens: the greatest difference, the largest value."""

    greatest: float
    largest: float

    @property
    def relative(self) -> float:
        return self.greatest / self.largest


def batch(clips: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Clips padded to the longest, [b, samples], and their lengths in samples, int32 [b]."""
    lengths = np.array([len(clip) for clip in clips], np.int32)
    return np.stack([np.pad(clip, (0, lengths.max() - len(clip))) for clip in clips]), lengths


def deviations(model, expert, clips: Sequence[np.ndarray]) -> list[Deviation]:
    """Of `model` (MaeAst) from `expert` (s3prl's) by layer; clips float32 [samples], one batch.

    Raises ValueError where the two hold different tokens for padding.
    """
    ours = model.encode(*batch(clips))
    theirs, padding = reference.hidden_states(expert, clips)
    if not np.array_equal(ours.padding, padding):
        raise ValueError("the two models hold different tokens for padding")
    return [
        Deviation(float(np.abs(a - b)[~padding].max()), float(np.abs(b)[~padding].max()))
        for a, b in zip(np.asarray(ours.hidden_states), theirs, strict=True)
    ]


def table(columns: dict[str, list[Deviation]]) -> str:
    """Markdown: a row a layer, two columns a model."""
    names = [f"{name}, greatest | {name}, relative" for name in columns]
    lines = [f"| layer | {' | '.join(names)} |", "|---" * (1 + 2 * len(columns)) + "|"]
    for layer, row in enumerate(zip(*columns.values(), strict=True), start=1):
        cells = [f"{deviation.greatest:.1e} | {deviation.relative:.1e}" for deviation in row]
        lines.append(f"| {layer} | {' | '.join(cells)} |")
    return "\n".join(lines)


def read_clips(files: Sequence[Path]) -> list[np.ndarray]:
    """Float32 clips of up to 10 s of the files, or of the embedded corpus."""
    if files:
        clips = [audio.decode(file)[:LONGEST_SAMPLES] for file in files]
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
