"""The embedded corpus is the same everywhere it is asked for, audible, varied and learnable."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from maeast_jax.data import demo_corpus

CLIPS_PER_FAMILY = 24


@pytest.fixture(scope="module")
def clips():
    """[families, CLIPS_PER_FAMILY] clips of the train split."""
    return np.array(
        [
            [demo_corpus.clip(family, index) for index in range(CLIPS_PER_FAMILY)]
            for family in demo_corpus.FAMILIES
        ]
    )


def features(clip):
    """The log energy in some 25 bands: level, spread and change over time, and flatness."""
    frames = np.lib.stride_tricks.sliding_window_view(clip / 32_768, 512)[::256]
    energy = np.abs(np.fft.rfft(frames * np.hanning(512)))[:, 1:] ** 2 + 1e-7
    edges = np.unique(np.geomspace(1, 257, 33).astype(int)) - 1
    widths = np.diff(edges)
    bands = np.log(np.add.reduceat(energy, edges[:-1], axis=1) / widths)
    logs = np.add.reduceat(np.log(energy), edges[:-1], axis=1) / widths
    change = np.abs(np.diff(bands, axis=0))
    flatness = (bands - logs)[:, widths > 4]
    return np.concatenate([x.mean(axis=0) for x in (bands, change, flatness)] + [bands.std(axis=0)])


def test_clips_have_the_stated_form(clips):
    assert len(demo_corpus.FAMILIES) == len(set(demo_corpus.FAMILIES)) == 10
    assert clips.dtype == np.int16
    assert clips.shape[-1] == 2.5 * 16_000 == demo_corpus.CLIP_SECONDS * demo_corpus.SAMPLE_RATE_HZ


def test_another_process_makes_the_same_clips_from_their_numbers_alone(clips):
    program = (
        "import hashlib; from maeast_jax.data import demo_corpus as d;"
        "print(hashlib.sha256(b''.join(d.clip(f, 5).tobytes() for f in d.FAMILIES)).hexdigest())"
    )
    there = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert there.stdout.strip() == hashlib.sha256(clips[:, 5].tobytes()).hexdigest()


def test_every_clip_is_audible_and_levels_vary_by_twenty_decibels(clips):
    peaks_db = 20 * np.log10(np.abs(clips.astype(int)).max(axis=-1) / 32_768)
    assert -25 < peaks_db.min() < peaks_db.max() < -2
    spread_db = np.ptp(peaks_db, axis=1)
    assert 14 < spread_db.min() < spread_db.max() < 22
    rms_db = 10 * np.log10(np.mean((clips / 32_768.0) ** 2, axis=-1))
    assert rms_db.min() > -50
    assert np.abs(clips.mean(axis=-1)).max() < 0.01 * 32_768


def test_clips_of_a_family_differ(clips):
    for family in clips:
        rows = np.array([features(clip) for clip in family])
        distance = np.abs(rows[:, None] - rows).mean(axis=-1)
        assert distance[~np.eye(len(rows), dtype=bool)].min() > 0.1


def test_families_differ_enough_to_be_classified(clips):
    train = np.array([[features(clip) for clip in family] for family in clips])
    valid = np.array(
        [
            [features(demo_corpus.clip(family, index)) for index in demo_corpus.SPLITS["valid"]]
            for family in demo_corpus.FAMILIES
        ]
    )
    mean, deviation = train.mean(axis=(0, 1)), train.std(axis=(0, 1))
    train, valid = (train - mean) / deviation, (valid - mean) / deviation
    truth = np.arange(10)[:, None]
    to_centroid = ((valid[:, :, None] - train.mean(axis=1)) ** 2).sum(axis=-1)
    assert (to_centroid.argmin(axis=-1) == truth).mean() > 0.6  # measured: 0.77
    apart = np.abs(train.mean(axis=1)[:, None] - train.mean(axis=1)).mean(axis=-1)
    assert apart[~np.eye(10, dtype=bool)].min() > 0.3  # two draws of one family: 0.07 to 0.23
    to_clip = ((valid[:, :, None, None] - train) ** 2).sum(axis=-1).min(axis=-1)
    assert (to_clip.argmin(axis=-1) == truth).mean() > 0.75  # measured: 0.87; chance is 0.1


def test_splits_name_every_clip_once(monkeypatch):
    monkeypatch.setattr(demo_corpus, "clip", lambda family, index: (family, index))
    train, valid = list(demo_corpus.examples("train")), list(demo_corpus.examples("valid"))
    assert (len(train), len(valid)) == (900, 100)
    assert len({example[0] for example in train + valid}) == 1000
    assert len({example[1] for example in train + valid}) == 1000
    assert train[91] == ("drums_001", ("drums", 1), "drums")
    assert valid[-1] == ("beeps_099", ("beeps", 99), "beeps")
