"""The HEAR API: its own validator where it is installed, values, and the times of the steps."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maeast_jax import fbank
from maeast_jax.inference import Embedder, load
from maeast_jax.interop import fairseq
from maeast_jax.model import tokens as patches
from maeast_jax.suites import hear

torch = pytest.importorskip("torch")

GOLDEN = Path(__file__).parents[1] / "golden"
WIDTH = 64


@pytest.fixture(scope="module", params=["patch", "frame"])
def tokens(request):
    return request.param


@pytest.fixture(scope="module")
def model(tokens):
    return hear.load_model(str(GOLDEN / f"tiny_{tokens}.pt"))


def noise(sounds, samples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((sounds, samples), generator=generator) * 2 - 1


@pytest.mark.slow
def test_the_validator_of_hear_has_no_complaint(tokens):
    if importlib.util.find_spec("hearvalidator") is None:
        pytest.skip("hearvalidator not installed: see requirements-reference.txt")
    command = [
        sys.executable, "-m", "hearvalidator.validate", "maeast_jax.suites.hear", "-d", "cpu",
        "-m", GOLDEN / f"tiny_{tokens}.pt",
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("Looks good!\n")
    assert ("suggest a interval" in run.stderr) == (tokens == "patch")  # 160 ms, 20 ms


def test_embeddings_are_those_of_the_embedder(model, tokens):
    assert isinstance(model, torch.nn.Module)
    assert model.sample_rate == 16_000
    audio = noise(3, 20_000)
    plain = load(GOLDEN / f"tiny_{tokens}.pt")
    embeddings, _ = hear.get_timestamp_embeddings(audio, model)
    wanted = np.stack(list(Embedder(plain, pool="none")(audio.numpy())))
    assert embeddings.dtype == torch.float32 and embeddings.device == audio.device
    np.testing.assert_array_equal(embeddings, wanted)
    scenes = hear.get_scene_embeddings(audio, model)
    assert scenes.dtype == torch.float32
    assert model.timestamp_embedding_size == model.scene_embedding_size == scenes.shape[1]
    np.testing.assert_allclose(scenes, embeddings.mean(dim=1), rtol=0, atol=1e-5)


def test_timestamps_are_the_middle_of_the_samples_of_a_step(model, tokens):
    audio = noise(2, 9_000)
    embeddings, timestamps = hear.get_timestamp_embeddings(audio, model)
    assert timestamps.shape == embeddings.shape[:2]
    bands = {"patch": 8, "frame": 1}[tokens]

    def steps(samples):
        tokens_NxP = patches.patchify(fbank.fbank(samples)[None], patches.patch_shape(tokens))[0]
        return jnp.sum(tokens_NxP.reshape(-1, bands * 256), axis=1)

    influence = np.asarray(jax.jacobian(steps)(jnp.asarray(audio[0].numpy())))
    assert len(influence) == timestamps.shape[1]
    for row, timestamp_ms in zip(influence, timestamps[0], strict=True):
        samples = np.flatnonzero(row)
        middle = (samples[0] + samples[-1] + 1) / 2
        assert timestamp_ms == pytest.approx(1000 * middle / 16_000, abs=1e-3)
    np.testing.assert_array_equal(timestamps[0], timestamps[1])


def test_sounds_of_any_length_have_an_embedding(model):
    for samples in (1, 399, 2_000):
        embeddings, timestamps = hear.get_timestamp_embeddings(noise(2, samples), model)
        assert torch.isfinite(embeddings).all() and timestamps.shape[1] >= 1
        assert hear.get_scene_embeddings(noise(2, samples), model).shape == (2, embeddings.shape[2])


def test_a_layer_and_the_mean_over_bands_can_be_asked_for(model, tokens):
    path = GOLDEN / f"tiny_{tokens}.pt"
    other = hear.load_model(path, layer=0, scene_pool="mean")
    assert other.scene_embedding_size == WIDTH
    audio = noise(1, 8_000)
    first, _ = hear.get_timestamp_embeddings(audio, other)
    last, _ = hear.get_timestamp_embeddings(audio, model)
    assert first.shape == last.shape and (first - last).abs().max() > 0.1
    by_band = first.mean(dim=1).reshape(-1, WIDTH)
    np.testing.assert_allclose(
        hear.get_scene_embeddings(audio, other)[0], by_band.mean(dim=0), rtol=0, atol=1e-5
    )


def test_audio_of_another_kind_is_one_error(model):
    for audio in (torch.zeros(800), torch.zeros(1, 800).int()):
        with pytest.raises(ValueError, match=r"expected float \[n_sounds, n_samples\]"):
            hear.get_scene_embeddings(audio, model)
    for audio, message in (
        (torch.full((1, 800), torch.inf), "clip 0: samples hold NaN or infinity"),
        (32_768 * noise(1, 800), "clip 0: .*; divide them by 32768"),
    ):
        with pytest.raises(ValueError, match=message):
            hear.get_timestamp_embeddings(audio, model)


def test_a_missing_path_is_one_error():
    with pytest.raises(ValueError, match="no checkpoint is built in; name one"):
        hear.load_model()


def test_long_sounds_are_cut_into_windows_as_long_as_the_training_clips(tmp_path):
    file = fairseq.read(GOLDEN / "tiny_patch.pt")
    file.cfg["task"]["max_sample_size"] = fbank.num_samples(64)
    fairseq.write(tmp_path / "x.safetensors", file)
    audio = noise(1, fbank.num_samples(128))
    whole = hear.load_model(GOLDEN / "tiny_patch.pt")
    cut = hear.load_model(tmp_path / "x.safetensors")
    first_half = audio[:, : fbank.num_samples(64)]
    wanted, _ = hear.get_timestamp_embeddings(first_half, whole)
    embeddings, timestamps = hear.get_timestamp_embeddings(audio, cut)
    assert timestamps.shape == (1, 8)
    np.testing.assert_allclose(embeddings[:, :4], wanted, rtol=0, atol=1e-4)
    uncut, _ = hear.get_timestamp_embeddings(audio, whole)
    assert np.abs(np.asarray(uncut[:, :4] - wanted)).max() > 1e-2
