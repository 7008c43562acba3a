"""Audio files of noise, and what the data sets built from them hold."""

import hashlib

import numpy as np
import soundfile

from maeast_jax import shards


def noise(seconds, seed):
    samples = round(seconds * 16_000)
    return np.random.default_rng(seed).integers(-9000, 9000, samples).astype(np.int16)


def write_wav(path, seconds, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, noise(seconds, seed), 16_000)


def records(data_dir, split, name="farm"):
    opened = shards.open_split(name, split, data_dir)
    return {
        record["id"]: (record["audio"], opened.label_names and opened.label_names[record["label"]])
        for record in opened.read(range(len(opened)))
    }


def digests(directory):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()
    }
