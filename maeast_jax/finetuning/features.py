"""One vector per clip for probes, computed once and kept in the workdir."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import numpy as np

from maeast_jax.data import Labelled, labelled
from maeast_jax.finetuning.run import FinetuneRun, Sets
from maeast_jax.inference import EncoderFeatures, features
from maeast_jax.runtime import storage

_FOLDER = "features"
_STATISTICS_CLIPS = 512


class Features:
    """Features of labelled sets, as `config.features` describes them.

    Attributes:
      encoder: how the encoder's features are computed; None for mean and deviation of mel bands.
    """

    def __init__(self, run: FinetuneRun):
        self._folder = run.workdir / _FOLDER
        self._extract = features.fbank_moments
        self.encoder = None
        if run.config.features.source == "encoder":
            self.encoder = _encoder_features(run)
            self._extract = self.encoder.extractor(run.init_from)

    def of(self, clips: Labelled) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Returns (float32 [n, size], truth, ids) of every clip, and keeps them in the workdir."""
        about = {
            "encoder": self.encoder and dataclasses.asdict(self.encoder),
            "sets": [f"{split.name}@{split.split}" for split in clips.clips.splits],
            "shards": [
                [file, *storage.stamp(file)] for s in clips.clips.splits for file in s.files
            ],
            "classes": clips.class_names,
            "index": hashlib.sha256(clips.index.tobytes()).hexdigest(),
        }
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        path = self._folder / f"{digest[:24]}.npz"
        if not path.exists():
            self._write(path, clips, about)
        with np.load(path) as saved:
            return saved["features"], saved["truth"], saved["ids"].tolist()

    def _write(self, path: Path, clips: Labelled, about: dict) -> None:
        vectors, truth, ids = labelled.embedded(clips, self._extract)
        self._folder.mkdir(parents=True, exist_ok=True)
        with storage.whole(path) as partial:
            about = np.array(json.dumps(about))
            np.savez(partial, features=vectors, truth=truth, ids=np.array(ids), about=about)


def _encoder_features(run: FinetuneRun) -> EncoderFeatures:
    config, start = run.config, run.init_from
    patch_frames, _ = config.model.patch_shape
    frames = start.window_frames if start else config.max_frames
    return EncoderFeatures(
        checkpoint=_address(start.path) if start else "",
        stamp=start.stamp if start else "",
        seed=0 if start else config.seed,
        model=config.model,
        normalize=statistics(run, run.folds[0]),
        pool=config.features.pool,
        layer=config.features.layer_number(config.model.encoder_layers),
        phases=config.features.phases,
        window_frames=max(1, frames // patch_frames) * patch_frames,
    )


def _address(path: str) -> str:
    """Returns the path of a checkpoint for use from any working directory."""
    return path if storage.is_remote(path) else os.path.abspath(path)


def statistics(run: FinetuneRun, sets: Sets) -> tuple[float, float] | None:
    """Returns mean and deviation to normalise inputs by; None takes the pretrained encoder's."""
    if run.normalize is None and run.init_from is None:
        return fbank_statistics(sets.train, run.config.seed)
    return run.normalize


def fbank_statistics(clips: Labelled, seed: int) -> tuple[float, float]:
    """Returns mean and deviation of the log energies of up to 512 clips that hold sound.

    `seed` draws the clips.
    """
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, 6))))
    places = random.permutation(np.flatnonzero(clips.has_sound))[:_STATISTICS_CLIPS]
    count = total = squares = 0.0
    for part in np.array_split(np.sort(places), -(-len(places) // 64)):
        for clip in clips.read(part):
            energies = features.log_energies(clip.samples).astype(np.float64)
            count += energies.size
            total += energies.sum()
            squares += np.square(energies).sum()
    mean = total / count
    return float(mean), float(np.sqrt(squares / count - mean**2))
