"""The model for perch-hoplite: windows, and a search in a database of its own."""

from pathlib import Path

import numpy as np
import pytest

from maeast_jax.inference import Embedder, load

pytest.importorskip("perch_hoplite.zoo.zoo_interface")
from ml_collections import config_dict

from maeast_jax.suites import hoplite

CHECKPOINT = str(Path(__file__).parents[1] / "golden" / "tiny_patch.pt")


@pytest.fixture(scope="module")
def model():
    config = config_dict.create(checkpoint=CHECKPOINT, window_size_s=1.0, hop_size_s=0.5)
    return hoplite.MaeAst.from_config(config)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_each_window_is_embedded_alone(model):
    audio = noise(41_000)
    outputs = model.embed(audio)
    windows = [audio[start : start + 16_000] for start in (0, 8_000, 16_000, 24_000)]
    wanted = list(Embedder(load(CHECKPOINT), pool="time")(windows))
    assert outputs.embeddings.shape == (4, 1, model.embedding_size)
    np.testing.assert_allclose(outputs.embeddings[:, 0], wanted, rtol=0, atol=1e-5)
    assert not outputs.batched and outputs.embeddings.dtype == np.float32


def test_sounds_shorter_than_a_window_are_embedded_as_they_are(model):
    audio = noise(12_000)
    (wanted,) = Embedder(load(CHECKPOINT), pool="time")([audio])
    np.testing.assert_allclose(model.embed(audio).embeddings[0, 0], wanted, rtol=0, atol=1e-5)
    assert np.isfinite(model.embed(audio[:10]).embeddings).all()


def test_a_batch_is_its_sounds_one_by_one(model):
    audio = noise(2, 20_000)
    outputs = model.batch_embed(audio)
    assert outputs.batched and outputs.embeddings.shape == (2, 1, 1, model.embedding_size)
    for embeddings, sound in zip(outputs.embeddings, audio, strict=True):
        np.testing.assert_allclose(embeddings, model.embed(sound).embeddings, rtol=0, atol=1e-5)


def test_a_sound_is_found_in_a_database(model):
    in_mem_impl = pytest.importorskip("perch_hoplite.db.in_mem_impl")
    database = in_mem_impl.InMemoryGraphSearchDB.create(embedding_dim=model.embedding_size)
    recording = database.insert_recording("recording.wav")
    seconds = np.arange(16_000) / 16_000
    tones = [np.sin(2 * np.pi * hertz * seconds) for hertz in (200, 800, 3_200)]
    audio = np.concatenate([*tones, noise(16_000)]).astype(np.float32)
    windows = {}
    for number, (embedding,) in enumerate(model.embed(audio).embeddings):
        start_s = number * model.hop_size_s
        window = database.insert_window(recording, [start_s, start_s + 1], embedding)
        windows[window] = start_s
    (query,) = model.embed(audio[32_000:48_000]).embeddings[0]
    results = database.search(query, 1, approximate=False, score_fn_name="cos")
    (found,) = [result.window_id for result in results]
    assert len(windows) == 7 and windows[found] == 2.0


def test_wrong_settings_are_one_error():
    for settings, message in (
        ({"sample_rate": 32_000}, "sample_rate=32000 must be 16000"),
        ({"hop_size_s": 0.0}, "hop_size_s=0.0 must be at least 0.025"),
        ({"checkpoint": ""}, "checkpoint='' names no model; give a path"),
        ({"pool": "none"}, r"gives \['steps', 'size'\] per sound.*; choose"),
        ({"layer": "all"}, r"gives \['layers', 'size'\] per sound.*; choose"),
    ):
        with pytest.raises(ValueError, match=message):
            hoplite.MaeAst(**{"checkpoint": CHECKPOINT} | settings)
