"""The encoder for X-ARES: its own checker, steps, and rows that do not see one another."""

from pathlib import Path

import numpy as np
import pytest

from maeast_jax.inference import Embedder, load

pytest.importorskip("torch")
import torch

from maeast_jax.suites import xares

GOLDEN = Path(__file__).parents[1] / "golden"
HOP_MS = {"patch": 160, "frame": 20}


@pytest.fixture(scope="module", params=["patch", "frame"])
def tokens(request):
    return request.param


@pytest.fixture(scope="module")
def encoder(tokens):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAEAST_JAX_CHECKPOINT", str(GOLDEN / f"tiny_{tokens}.pt"))
        return xares.MaeAstEncoder()


def noise(sounds, samples, seed=0):
    return torch.randn((sounds, samples), generator=torch.Generator().manual_seed(seed))


def padded(sounds):
    return torch.nn.utils.rnn.pad_sequence(sounds, batch_first=True)


def test_the_checker_of_xares_has_no_complaint(encoder):
    checker = pytest.importorskip("xares.audio_encoder_checker")
    utils = pytest.importorskip("xares.utils")
    assert utils.attr_from_py_path("maeast_jax/suites/xares.py", "Encoder") is type(encoder)
    assert checker.check_audio_encoder(encoder) is True


def test_one_name_of_the_module_ends_in_encoder():
    assert [name for name in dir(xares) if name.endswith("Encoder")] == ["MaeAstEncoder"]


def test_steps_are_those_of_the_embedder(encoder, tokens):
    assert isinstance(encoder, torch.nn.Module)
    assert encoder.sampling_rate == 16_000 and encoder.hop_size_in_ms == HOP_MS[tokens]
    audio = noise(2, 50_000)
    assert audio.abs().max() > 3  # beyond full scale
    embeddings = encoder(audio)
    plain = Embedder(load(GOLDEN / f"tiny_{tokens}.pt"), pool="none")
    assert embeddings.dtype == torch.float32 and embeddings.device == audio.device
    np.testing.assert_array_equal(embeddings, np.stack(list(plain(audio.numpy()))))
    assert encoder.output_dim == embeddings.shape[2]
    assert 0 <= 3125 - embeddings.shape[1] * encoder.hop_size_in_ms < encoder.hop_size_in_ms + 15
    np.testing.assert_array_equal(encoder(audio[0]), embeddings[:1])


def test_neither_steps_nor_their_mean_depend_on_the_padding_of_the_batch(encoder):
    short, middle, long = noise(1, 7_000)[0], noise(1, 16_000, 1)[0], noise(1, 40_000, 2)[0]
    batch = encoder(padded([short, middle, long]))
    assert torch.isfinite(batch).all()
    for row, sound in zip(batch, (short, middle, long), strict=True):
        (alone,) = encoder(sound)
        np.testing.assert_allclose(row[: len(alone)], alone, rtol=0, atol=1e-5)
        np.testing.assert_allclose(row.mean(dim=0), alone.mean(dim=0), rtol=0, atol=1e-5)
    seen = np.stack(list(encoder.embedder(padded([short, long]).numpy())))
    assert np.abs(seen[0] - batch[0].numpy()).max() > 1e-2  # so a model that saw the zeros fails


def test_rows_of_zeros_and_very_short_sounds_have_embeddings(encoder):
    few = encoder(torch.zeros(2, 100))
    many = encoder(padded([torch.zeros(100), noise(1, 20_000)[0]]))
    assert few.shape[1] == 1 and torch.isfinite(many).all()
    np.testing.assert_allclose(many[0], few[:1, 0].expand(many[0].shape), rtol=0, atol=1e-5)


def test_audio_of_another_kind_is_one_error(encoder):
    with pytest.raises(ValueError, match=r"expected float \[n_sounds, n_samples\]"):
        encoder(torch.zeros(1, 2, 800))
    with pytest.raises(ValueError, match="clip 0: samples hold NaN or infinity"):
        encoder(torch.full((1, 800), torch.nan))


def test_environment_variables_name_the_model(monkeypatch):
    monkeypatch.delenv("MAEAST_JAX_CHECKPOINT", raising=False)
    with pytest.raises(ValueError, match=r"^MAEAST_JAX_CHECKPOINT is not set; name a checkpoint"):
        xares.MaeAstEncoder()
    path = str(GOLDEN / "tiny_patch.pt")
    monkeypatch.setenv("MAEAST_JAX_CHECKPOINT", path)
    monkeypatch.setenv("MAEAST_JAX_LAYER", "0")
    audio = noise(1, 8_000)
    (wanted,) = Embedder(load(path), pool="none", layer=0)(audio.numpy())
    np.testing.assert_array_equal(xares.MaeAstEncoder()(audio)[0], wanted)
    for layer, message in (("9", "layer='9' is not one of the model's"), ("all", "one layer")):
        monkeypatch.setenv("MAEAST_JAX_LAYER", layer)
        with pytest.raises(ValueError, match=message):
            xares.MaeAstEncoder()
