"""Audio files of noise, labelled tones, and what the data sets built from them hold."""

import hashlib

import numpy as np
import pytest
import soundfile

from maeast_jax.data import dataset
from maeast_jax.ingest import BuildOptions, ManifestError, build_dataset


def noise(seconds, seed):
    samples = round(seconds * 16_000)
    return np.random.default_rng(seed).integers(-9000, 9000, samples).astype(np.int16)


def clips_of_noise(count, seed, labels=None):
    """Clips of several lengths for `writer.write`, each with one of the labels in turn."""
    random = np.random.default_rng(seed)
    for index in range(count):
        samples = random.integers(-9000, 9000, 4_000 + 1_500 * index).astype(np.int16)
        yield f"{seed}-{index}", samples, labels and labels[index % len(labels)]


TONES = ["high", "low", "noise"]


def tones(count, seed):
    """Labelled clips for `writer.write`: tones of two heights, and noise."""
    random = np.random.default_rng(seed)
    for index in range(count):
        label = index % 3
        time = np.arange(int(random.integers(3_000, 6_000))) / 16_000
        samples = random.normal(0, 500 if label < 2 else 6_000, len(time))
        if label < 2:
            samples += 8_000 * np.sin(2 * np.pi * (3_000, 300)[label] * time)
        yield f"{seed}-{index}", samples.astype(np.int16), TONES[label]


def write_wav(path, seconds, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, noise(seconds, seed), 16_000)


def touch(root, *names):
    """Makes empty files below `root`."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def error_of(function, *args, **kwargs):
    """Returns the message of the ManifestError that the call raises; it is one line."""
    with pytest.raises(ManifestError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def records(data_dir, split, name="farm"):
    opened = dataset.open_split(name, split, data_dir)
    return {
        record["id"]: (record["audio"], opened.label_names and opened.label_names[record["label"]])
        for record in opened.read(range(len(opened)))
    }


def digests(directory):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()
    }


def build(**options):
    """Builds a data set (`farm`), decoding in one process, unless `options` say otherwise."""
    alone = {} if "beam_pipeline_options" in options else {"num_processes": 1}
    return build_dataset(BuildOptions(**{"name": "farm", **alone, **options}))


def visible(folder):
    """The names in a folder, sorted, without hidden ones such as the lock of a data set."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
