"""python -m benchmarks.shifts --data_dir=DIR --pretrained=RUN --set=NAME

Measures how much accuracy a probe loses when sounds start at another place of the grid of tokens,
which a model of patches can tell. A linear probe is fitted on frozen features of clips as they are,
and scored on test clips with some frames of silence in front. It prints one row per way of pooling;
`mel` is the mean and deviation of the mel bands, which have no grid. Values are accuracies on
NAME@test in per cent.
"""

import argparse
from collections.abc import Iterator

import numpy as np

from maeast_jax import fbank
from maeast_jax.data import labelled
from maeast_jax.evaluation import probe
from maeast_jax.inference import Embedder, features, pretrained

WAYS = (("time", 1), ("time", 4), ("moments", 1), ("moments", 4))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--pretrained", required=True)
    parser.add_argument("--set", required=True)
    parser.add_argument(
        "--frames", default="0,4,8,12,16", help="frames of silence in front of the clips"
    )
    options = parser.parse_args()
    shifts = [int(text) for text in options.frames.split(",")]
    train = labelled.open_labelled(options.set, "train", options.data_dir)
    valid, test = (
        labelled.open_labelled(
            f"{options.set}@{split}", split, options.data_dir, class_names=train.class_names
        )
        for split in ("valid", "test")
    )
    source = pretrained.read(options.pretrained)
    model = source.encoder_only().model("float32")
    ways = {
        f"{pool}, {phases} phase(s)": Embedder(
            model, pool=pool, phases=phases, window_frames=source.window_frames
        )
        for pool, phases in WAYS
    }
    print(f"| features | {' | '.join(f'{n} frames' for n in shifts)} |")
    print(f"|---|{'---|' * len(shifts)}")
    for name, embed in {"mel": features.fbank_moments, **ways}.items():
        train_x, train_y, _ = labelled.embedded(train, embed)
        valid_x, valid_y, _ = labelled.embedded(valid, embed)
        fitted = probe.linear(train_x, train_y, valid_x, valid_y, train.num_classes)
        cells = []
        for frames in shifts:
            x, truth, _ = labelled.embedded(test, _later(embed, frames))
            cells.append(f"{100 * np.mean(fitted.scores(x).argmax(axis=1) == truth):.1f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def _later(embed, frames: int):
    """Returns `embed` for clips that start after `frames` frames of silence."""
    silence = np.zeros(frames * fbank.FRAME_SHIFT, np.int16)

    def embed_later(clips: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        return embed(np.concatenate([silence, samples]) for samples in clips)

    return embed_later


if __name__ == "__main__":
    main()
