"""The encoder for XARES-LLM, by the rules of its checker: it is on no package index."""

import inspect
from pathlib import Path

import numpy as np
import pytest

from maeast_jax.inference import Embedder, load

pytest.importorskip("torch")
import torch

from maeast_jax.suites import xares_llm

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module", params=["patch", "frame"])
def encoder(request):
    return xares_llm.MaeAstEncoder(checkpoint=str(GOLDEN / f"tiny_{request.param}.pt"))


def noise(sounds, samples, seed=0):
    return torch.randn((sounds, samples), generator=torch.Generator().manual_seed(seed))


def batch(*sounds):
    audio = torch.nn.utils.rnn.pad_sequence(sounds, batch_first=True)
    lengths = torch.tensor([len(sound) for sound in sounds])
    return audio, (torch.arange(audio.shape[1]) < lengths[:, None]).int()


def test_the_interface_is_the_one_that_the_checker_asks_for(encoder):
    assert [name for name in dir(xares_llm) if name.endswith("Encoder")] == ["MaeAstEncoder"]
    assert isinstance(encoder, torch.nn.Module)
    assert next(encoder.parameters()).device.type == "cpu"
    assert len(inspect.signature(encoder.forward).parameters) == 2
    embeddings, mask = encoder(noise(3, 50_000), None)
    assert embeddings.shape[::2] == (3, encoder.output_dim) and mask is None
    assert embeddings.dtype == torch.float32
    np.testing.assert_array_equal(
        embeddings, np.stack(list(encoder.embedder(noise(3, 50_000).numpy())))
    )


def test_padding_is_masked_and_changes_nothing(encoder):
    # The last samples of the first sound are zeros, and are not padding.
    sounds = [noise(1, samples, samples)[0] for samples in (9_000, 300, 30_000)]
    sounds[0][-4_000:] = 0
    embeddings, mask = encoder(*batch(*sounds))
    assert mask.shape == embeddings.shape[:2] and mask.dtype == torch.int64
    for row, row_mask, sound in zip(embeddings, mask, sounds, strict=True):
        (alone,), (alone_mask,) = encoder(*batch(sound))
        steps = encoder.embedder.num_steps(max(400, len(sound)))
        assert len(alone) == steps and alone_mask.all()
        assert row_mask.tolist() == [1] * steps + [0] * (len(row) - steps)
        np.testing.assert_allclose(row[:steps], alone, rtol=0, atol=1e-5)
        assert not row[steps:].any()


def test_a_mask_that_is_no_padding_at_the_end_is_one_error(encoder):
    audio, mask = batch(noise(1, 800)[0], noise(1, 400)[0])
    for wrong in (mask.flip(1), mask[:, :700], mask[:1]):
        with pytest.raises(ValueError, match="in each row ones, then zeros; pad sounds at"):
            encoder(audio, wrong)


def test_arguments_come_before_environment_variables(monkeypatch):
    monkeypatch.setenv("MAEAST_JAX_CHECKPOINT", "nowhere")
    monkeypatch.setenv("MAEAST_JAX_LAYER", "1")
    path = GOLDEN / "tiny_patch.pt"
    encoder = xares_llm.MaeAstEncoder(checkpoint=str(path), layer=0)
    audio = noise(1, 8_000)
    (wanted,) = Embedder(load(path), pool="none", layer=0)(audio.numpy())
    np.testing.assert_array_equal(encoder(audio)[0][0], wanted)
    with pytest.raises(ValueError, match="nowhere"):
        xares_llm.MaeAstEncoder()
