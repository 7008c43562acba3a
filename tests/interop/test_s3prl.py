"""Our model against s3prl's expert: the same checkpoint file and clips, equal hidden states."""

import numpy as np
import pytest
import runs
import soundfile
from flax import nnx

from maeast_jax import fbank
from maeast_jax.data import demo_corpus
from maeast_jax.export import export
from maeast_jax.inference import pretrained
from maeast_jax.model import MaeAst
from maeast_jax.model import tokens as patches

pytestmark = pytest.mark.slow
torch = pytest.importorskip("torch")

from benchmarks import fidelity, reference  # noqa: E402 (reference needs torch)

if reference.missing():
    pytest.skip(reference.missing(), allow_module_level=True)

# Relative to a layer's largest value. The deviation found is 5e-6.
TOLERANCE = 2e-5
TINY = {
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_embed_dim": 64,
    "decoder_embed_dim": 64,
    "encoder_ffn_embed_dim": 128,
    "encoder_attention_heads": 4,
    "max_tokens": 512,
}


def clips_of(*num_samples):
    """Float32 clips of these lengths, at most 5 s, of various sounds."""
    sounds = [demo_corpus.clip(family, 0) for family in demo_corpus.FAMILIES]
    return [
        np.float32(np.tile(sound, 2)[:samples]) / 32_768
        for sound, samples in zip(sounds, num_samples, strict=False)
    ]


def both(folder, **changes):
    """(our model, s3prl's expert) of one random checkpoint."""
    path = reference.make_checkpoint(folder / "model.pt", **changes)
    models = pretrained.load(path), reference.expert(path)
    path.unlink()
    return models


def encode(model, clips):
    """Hidden states of the real tokens, [layers, N, D] per clip of a batch."""
    out = model.encode(*fidelity.batch(clips))
    states, real = np.asarray(out.hidden_states), ~np.asarray(out.padding)
    return [states[:, i, real[i]] for i in range(len(clips))]


def encode_theirs(expert, clips):
    states, padding = reference.hidden_states(expert, clips)
    return [states[:, i, ~padding[i]] for i in range(len(clips))]


@pytest.mark.parametrize("tokens", ["patch", "frame"])
def test_hidden_states_of_a_base_model_are_those_of_s3prl(tokens, tmp_path):
    model, expert = both(tmp_path, tokens=tokens)
    clips = clips_of(4_801, 21_000, 64_000)
    found = fidelity.deviations(model, expert, clips)
    assert len(found) == 12
    assert all(deviation.relative < TOLERANCE for deviation in found)


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_norm_first": True},
        {"tokens": "8x32", "decoder_embed_dim": 32, "use_post_enc_proj": True},
        {"encoder_embed_dim": 60, "decoder_embed_dim": 60},  # 15 per head
    ],
)
def test_hidden_states_of_other_architectures_are_those_of_s3prl(changes, tmp_path):
    models = both(tmp_path, **TINY | changes)
    found = fidelity.deviations(*models, clips_of(4_801, 21_000, 40_000))
    assert len(found) == 3
    assert all(deviation.relative < TOLERANCE for deviation in found)


@pytest.mark.parametrize("changes", [{}, {"tokens": "frame", "layer_norm_first": True}], ids=str)
def test_hidden_states_in_transformers_are_those_of_s3prl(changes, tmp_path):
    pytest.importorskip("transformers")
    path = reference.make_checkpoint(tmp_path / "model.pt", **TINY | changes)
    export(path, tmp_path / "folder", folder_format="transformers")
    clips = clips_of(4_801, 21_000, 40_000)
    theirs = reference.hidden_states(reference.expert(path), clips)
    exported = reference.transformers_hidden_states(tmp_path / "folder", clips)
    found = fidelity.compare(exported, theirs)
    assert len(found) == 3
    assert all(deviation.relative < 1e-5 for deviation in found)


@pytest.mark.parametrize("changes", [{"layer_norm_first": True}, {"use_post_enc_proj": True}])
def test_predictions_at_masked_places_are_those_of_s3prl(changes, tmp_path, monkeypatch):
    model, expert = both(tmp_path, **TINY | changes)
    fbank_1xTxF = fbank.fbank(clips_of(21_000)[0][None])
    patches_1xNxP = model.normalized_patches(fbank_1xTxF, training=False)
    order = np.random.default_rng(0).permutation(patches_1xNxP.shape[1]).astype(np.int32)
    kept, masked = np.sort(order[:20])[None], np.sort(order[20:])[None]
    ours = nnx.jit(MaeAst.pretrain)(model, patches_1xNxP, kept, masked)

    def forward_mask(features, padding_mask):
        return kept.tolist(), masked.tolist(), masked.size

    monkeypatch.setattr(expert.model, "forward_mask", forward_mask)
    features = torch.from_numpy(np.array(fbank_1xTxF))
    with torch.no_grad():
        theirs = expert.model(features, torch.zeros(features.shape[:2], dtype=torch.bool))
    assert_close(ours.reconstruction, theirs["logit_m_list_recon"])
    assert_close(ours.classification, theirs["logit_m_list_class"])


def test_decoder_of_another_width_is_that_of_s3prl(tmp_path):
    # All tokens take part: s3prl's mask token has the encoder's width, so it fits no other decoder.
    changes = {"decoder_embed_dim": 32, "use_post_enc_proj": True}
    model, expert = both(tmp_path, **TINY | changes)
    fbank_1xTxF = fbank.fbank(clips_of(21_000)[0][None])
    x = model.token_projection(model.normalized_patches(fbank_1xTxF, training=False))
    x, _ = model.encoder(x + patches.sinusoid(x.shape[1], 64))
    x = model.decoder_projection(x)
    _, ours = model.decoder(x + patches.sinusoid(x.shape[1], 32))
    features = torch.from_numpy(np.array(fbank_1xTxF))
    no_padding = torch.zeros(features.shape[:2], dtype=torch.bool)
    with torch.no_grad():
        theirs = expert.model(features, no_padding, mask=False, is_decoder_finetune=True)
    for a, b in zip(ours, theirs["hidden_states"][-2:], strict=True):
        assert_close(a, b)


def assert_close(actual, expected):
    expected = expected.numpy()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@pytest.fixture(scope="module", params=["patch", "frame"])
def tiny_models(request, tmp_path_factory):
    """(frames per token, tokens per time step, our model, s3prl's expert)"""
    model, expert = both(tmp_path_factory.mktemp("tiny"), tokens=request.param, **TINY)
    frames, bands = model.config.patch_shape
    return frames, fbank.NUM_MEL_BANDS // bands, model, expert


def test_a_clips_last_partial_patch_is_a_token_only_beside_a_longer_clip(tiny_models):
    frames, per_step, model, expert = tiny_models
    clip, longer = clips_of(fbank.num_samples(3 * frames + 1), fbank.num_samples(6 * frames))
    for embed, embedder in ((encode, model), (encode_theirs, expert)):
        (alone,) = embed(embedder, [clip])
        beside, _ = embed(embedder, [clip, longer])
        assert alone.shape[1] == 3 * per_step
        assert beside.shape[1] == 4 * per_step
        # The hidden states of the clip's other tokens change with it.
        assert np.abs(alone - beside[:, : 3 * per_step]).max() > 0.01
    for clips in ([clip], [clip, longer]):
        found = fidelity.deviations(model, expert, clips)
        assert all(deviation.relative < TOLERANCE for deviation in found)


def test_a_clip_of_whole_patches_has_equal_hidden_states_in_any_batch(tiny_models):
    frames, per_step, model, expert = tiny_models
    # 159 is the most samples that add no frame.
    clip, longer = clips_of(fbank.num_samples(32) + 159, fbank.num_samples(101))
    for embed, embedder in ((encode, model), (encode_theirs, expert)):
        (alone,) = embed(embedder, [clip])
        beside, _ = embed(embedder, [clip, longer])
        assert alone.shape[1] == beside.shape[1] == 32 // frames * per_step
        np.testing.assert_allclose(alone, beside, rtol=0, atol=1e-5 * np.abs(alone).max())


@pytest.mark.parametrize(
    ("changes", "encoder_only"),
    [({}, False), ({"decoder_width": 32}, False), ({"decoder_width": 32, "pre_norm": True}, True)],
    ids=str,
)
def test_an_exported_file_loads_strictly_in_s3prl(changes, encoder_only, tmp_path):
    sizes = {"width": 64, "heads": 4, "decoder_width": 64, "mlp_width": 96}
    runs.write(tmp_path / "run", **sizes | changes)
    export(tmp_path / "run", tmp_path / "x.pt", encoder_only=encoder_only)
    expert = reference.expert(tmp_path / "x.pt")  # load_state_dict(strict=True)
    ours = pretrained.load(tmp_path / "run")
    for deviation in fidelity.deviations(ours, expert, clips_of(9_000, 12_345)):
        assert deviation.relative < TOLERANCE


def test_the_table_has_a_row_per_layer(tmp_path, capsys):
    pytest.importorskip("transformers")
    path = reference.make_checkpoint(tmp_path / "tiny.pt", **TINY)
    sound = tmp_path / "sound.wav"
    soundfile.write(sound, clips_of(9_000)[0], 16_000)
    fidelity.main([str(sound), f"--checkpoint={path}"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Clips of 0.56 s in one batch, float32."
    assert lines[2] == "| layer | maeast_jax | transformers |"
    assert [line.split(" ")[1] for line in lines[4:]] == ["1", "2", "3"]


def test_a_missing_clip_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"^error: .*missing.wav: not found$"):
        fidelity.main([str(tmp_path / "missing.wav")])
