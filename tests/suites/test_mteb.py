"""The encoder for MTEB, with stand-ins for the three names of MTEB that it uses.

MTEB brings some 60 packages, and torchaudio, whose wheels do not go with a torch for CPUs. Where
MTEB is installed, a task of its own runs too.
"""

import importlib
import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from maeast_jax.inference import Embedder, load

CHECKPOINT = Path(__file__).parents[1] / "golden" / "tiny_patch.pt"
TASK = types.SimpleNamespace(name="Task")
SPLIT = {"task_metadata": TASK, "hf_split": "test", "hf_subset": "default"}


class Batches:
    """A DataLoader of sounds: it collates what it holds."""

    def __init__(self, *batches):
        self.batches = batches
        self.collate_fn = None

    def __iter__(self):
        return map(self.collate_fn, self.batches)


@pytest.fixture
def adapter(monkeypatch):
    class Collator:
        def __init__(self, target_sampling_rate):
            assert target_sampling_rate == 16_000

        def __call__(self, batch):
            return batch

    for module, names in (
        ("mteb", {}),
        ("mteb.models", {"ModelMeta": types.SimpleNamespace}),
        ("mteb.models.abs_encoder", {"AbsEncoder": object}),
        ("mteb.models.modality_collators", {"AudioCollator": Collator}),
    ):
        stand_in = types.ModuleType(module)
        vars(stand_in).update(names)
        monkeypatch.setitem(sys.modules, module, stand_in)
    monkeypatch.delitem(sys.modules, "maeast_jax.suites.mteb", raising=False)
    yield importlib.import_module("maeast_jax.suites.mteb")
    sys.modules.pop("maeast_jax.suites.mteb", None)


def noise(samples, seed=0):
    return np.random.default_rng(seed).normal(size=samples).astype(np.float32)


def sound(samples, rate_hz=16_000):
    return {"array": samples, "sampling_rate": rate_hz}


def test_sounds_of_all_batches_are_embedded_in_order(adapter):
    sounds = [noise(samples, samples) for samples in (9_000, 100, 30_000)]
    first = {"audio": [sound(sounds[0]), sound(np.float64(sounds[1]))]}
    embeddings = adapter.load_model(CHECKPOINT).encode(
        Batches(first, {"audio": [sound(sounds[2][None])]}), **SPLIT, batch_size=2
    )
    sounds[1] = np.pad(sounds[1], (0, 300))
    wanted = np.stack(list(Embedder(load(CHECKPOINT), pool="time")(sounds)))
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings, wanted, rtol=0, atol=1e-5)


def test_results_of_other_settings_are_kept_apart(adapter):
    meta = adapter.load_model(CHECKPOINT).mteb_model_meta
    other = adapter.load_model(CHECKPOINT, layer=0, pool="mean").mteb_model_meta
    frame = adapter.load_model(CHECKPOINT.with_name("tiny_frame.pt")).mteb_model_meta
    assert meta.experiment_kwargs == {"layer": 2, "pool": "time", "dtype": "float32"}
    assert other.experiment_kwargs == {"layer": 0, "pool": "mean", "dtype": "float32"}
    assert meta.embed_dim == 8 * other.embed_dim
    assert meta.revision == other.revision != frame.revision
    assert meta.modalities == ["audio"]


def test_wrong_inputs_are_one_error(adapter):
    model = adapter.load_model(CHECKPOINT)
    with pytest.raises(ValueError, match="Task has no audio but text; choose tasks of sounds"):
        model.encode(Batches({"text": ["a"]}), **SPLIT)
    with pytest.raises(ValueError, match="Task has a sound at 8000 Hz; resample it to 16000"):
        model.encode(Batches({"audio": [sound(noise(800), 8_000)]}), **SPLIT)
    with pytest.raises(ValueError, match=r"gives \['steps', 'size'\] per sound.*; choose"):
        adapter.load_model(CHECKPOINT, pool="none")


def test_without_mteb_the_error_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "mteb", None)
    monkeypatch.setitem(sys.modules, "mteb.models", None)
    monkeypatch.delitem(sys.modules, "maeast_jax.suites.mteb", raising=False)
    with pytest.raises(ImportError, match=r'needs mteb.*: pip install "mteb\[audio\]"$'):
        importlib.import_module("maeast_jax.suites.mteb")


@pytest.mark.slow
def test_a_task_of_mteb_tells_tones_from_noise(tmp_path):
    mteb = pytest.importorskip("mteb")
    pytest.importorskip("torchcodec")
    from datasets import Audio, Dataset, DatasetDict
    from mteb.mocks.mock_tasks import MockAudioClassification

    from maeast_jax.suites.mteb import load_model

    class Task(MockAudioClassification):
        def load_data(self, **kwargs):
            self.dataset = DatasetDict(train=split(24), test=split(12))
            self.data_loaded = True

    def split(count):
        random = np.random.default_rng(0)
        sounds = []
        for number in range(count):
            rate_hz = (8_000, 16_000, 22_050)[number % 3]
            seconds = np.arange(rate_hz) / rate_hz
            tone = np.sin(2 * np.pi * random.uniform(300, 600) * seconds)
            hiss = random.normal(size=rate_hz)
            sounds.append(sound(np.float32(0.3 * (tone if number // 3 % 2 else hiss)), rate_hz))
        labels = [number // 3 % 2 for number in range(count)]
        data = Dataset.from_dict({"audio": sounds, "label": labels})
        return data.cast_column("audio", Audio())

    cache = mteb.cache.ResultCache(tmp_path)
    results = mteb.evaluate(load_model(CHECKPOINT), [Task()], cache=cache, co2_tracker=False)
    assert results.task_results[0].get_score() > 0.9
