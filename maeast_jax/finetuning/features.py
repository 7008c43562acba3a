"""One vector per clip for probes, computed once and kept in the workdir."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from maeast_jax import fbank
from maeast_jax.data import Labelled, labelled, pipeline
from maeast_jax.finetuning.run import FinetuneRun, Sets
from maeast_jax.inference import Embedder
from maeast_jax.model import MaeAst, stream_key
from maeast_jax.runtime import storage

_FOLDER = "features"
_STATISTICS_CLIPS = 512


class Features:
    """Features of labelled sets, as `config.features` describes them."""

    def __init__(self, run: FinetuneRun):
        config, section = run.config, run.config.features
        self._folder = run.workdir / _FOLDER
        self._embedder = None
        # What the features depend on beside the clips: it names the file that keeps them.
        self._about = {"source": section.source, "max_frames": config.max_frames}
        if section.source == "encoder":
            normalize = statistics(run, run.folds[0])
            model = _model(run, normalize)
            patch_frames, _ = model.config.patch_shape
            frames = run.init_from.window_frames if run.init_from else config.max_frames
            layer = section.layer_number(config.model.encoder_layers)
            self._embedder = Embedder(
                model,
                pool=section.pool,
                phases=section.phases,
                layer=layer,
                window_frames=max(1, frames // patch_frames) * patch_frames,
            )
            self._about |= {
                "checkpoint": [run.init_from.path, run.init_from.stamp]
                if run.init_from
                else f"seed {config.seed}",
                "model": str(model.config),
                "pool": section.pool,
                "layer": layer,
                "phases": section.phases,
                "window_frames": frames,
                "normalize": normalize,
            }

    def of(self, clips: Labelled) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Returns (float32 [n, size], truth, ids) of every clip, and keeps them in the workdir."""
        about = {
            **self._about,
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
        embed = self._embedder or fbank_moments
        features, truth, ids = labelled.embedded(clips, embed)
        self._folder.mkdir(parents=True, exist_ok=True)
        with storage.whole(path) as partial:
            about = np.array(json.dumps(about))
            np.savez(partial, features=features, truth=truth, ids=np.array(ids), about=about)


def _model(run: FinetuneRun, normalize: tuple[float, float] | None) -> MaeAst:
    """Returns the pretrained encoder, or one at its initial values, with these statistics."""
    if run.init_from is not None:
        model = run.init_from.encoder_only().model(run.config.model.dtype)
    else:
        key = stream_key(run.config.seed, np.int32(0), "params")
        model = MaeAst(run.config.model, nnx.Rngs(params=key))
    if normalize is not None:
        model.input_norm.set_statistics(*normalize)
    return model


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
            energies = np.asarray(_fbank(clip.samples), np.float64)
            count += energies.size
            total += energies.sum()
            squares += np.square(energies).sum()
    mean = total / count
    return float(mean), float(np.sqrt(squares / count - mean**2))


def fbank_moments(clips: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Yields mean and deviation over time of each mel band, [256], for each clip."""
    for samples in clips:
        energies = np.asarray(_fbank(samples))
        yield np.concatenate([energies.mean(axis=0), energies.std(axis=0)])


def _fbank(samples: np.ndarray) -> np.ndarray:
    """Returns [frames, bands], computed at one of few lengths so that little is compiled."""
    num_frames = fbank.num_frames(len(samples))
    padded = np.zeros(fbank.num_samples(pipeline.bucket_steps(num_frames, 1024)), np.int16)
    padded[: min(len(samples), len(padded))] = samples[: len(padded)]
    return np.asarray(_jitted_fbank(padded))[:num_frames]


_jitted_fbank = jax.jit(fbank.fbank)
