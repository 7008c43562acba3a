"""Models from any checkpoint."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny
from flax import nnx

import maeast_jax
from maeast_jax import checkpoint
from maeast_jax.fbank import num_samples
from maeast_jax.inference import pretrained
from maeast_jax.interop import fairseq, huggingface
from maeast_jax.model import MaeAst, split_model
from maeast_jax.train import train
from maeast_jax.training.steps import TrainState, make_reconstruct

GOLDEN = Path(__file__).parents[1] / "golden"
WAVE = np.random.default_rng(0).integers(-9000, 9000, (2, 6000)).astype(np.int16)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of bfloat16 with checkpoints at steps 0 and 5."""
    root = tmp_path_factory.mktemp("runs")
    folder = runs.write(root / "run", dtype="bfloat16")
    runs.write(root / "later", seed=1, dtype="bfloat16")
    (root / "later" / "checkpoints" / "0").rename(folder / "checkpoints" / "5")
    return folder


@pytest.fixture(scope="module")
def model(workdir):
    return maeast_jax.load(workdir)


def test_the_authors_file_gives_the_authors_hidden_states(golden):
    values = golden["values"]
    model = maeast_jax.load(GOLDEN / f"tiny_{golden['tokens']}.pt")
    assert isinstance(model, MaeAst) and model.config.tokens == golden["tokens"]
    out = model.encode_fbank(
        values["features.fbank"], np.asarray(values["features.lengths_frames"], np.int32)
    )
    wanted = values["features.hidden_states"]
    np.testing.assert_allclose(out.hidden_states, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


def test_a_run_and_each_of_its_checkpoints_load(workdir):
    newest, first = (maeast_jax.load(path) for path in (workdir, workdir / "checkpoints" / "0"))
    part = checkpoint.load_part(checkpoint.find(workdir), "weights")
    _, params, statistics = split_model(newest)
    jax.tree.map(np.testing.assert_array_equal, params, part["params"])
    jax.tree.map(np.testing.assert_array_equal, statistics, part["statistics"])
    assert np.any(first.encode(WAVE).hidden_states != newest.encode(WAVE).hidden_states)


def test_a_model_computes_in_float32_by_default(workdir, model):
    assert pretrained.read(workdir).config.dtype == "bfloat16"
    exact, rough = model, maeast_jax.load(workdir, "bfloat16")
    assert (exact.config.dtype, rough.config.dtype) == ("float32", "bfloat16")
    a, b = exact.encode(WAVE).hidden_states, rough.encode(WAVE).hidden_states
    assert 0 < np.abs(a - b).max() < 0.1 * np.abs(a).max()


def test_encoding_compiles_once_per_shape(model):
    model.encode(WAVE)
    with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(nnx, "merge", None)  # tracing calls it
        model.encode(WAVE[::-1], [5000, 6000])
        with pytest.raises(TypeError):
            model.encode(WAVE[:, :-1600])


def test_clips_without_lengths_are_full(model):
    np.testing.assert_array_equal(
        model.encode(WAVE).hidden_states, model.encode(WAVE, [6000, 6000]).hidden_states
    )


@pytest.mark.parametrize(
    ("waveforms", "lengths", "message"),
    [
        (WAVE[0], None, r"waveforms are \(6000,\), expected \[clips, samples\]"),
        (WAVE, [6000], r"lengths are \(1,\), expected one .* clip, 2"),
        (
            WAVE[:, :2799],
            None,
            "waveforms of 2799 samples, expected at least 2800, the 16 frames of a patch token",
        ),
        (WAVE, [6000, 399], "a length of 399 samples, expected 400"),
        (WAVE, [6001, 6000], "a length of 6001 samples, expected 400 .* to 6000"),
        (np.where(np.arange(6000) == 9, np.nan, 0.0)[None], None, "samples hold NaN or infinity"),
        (np.float32(WAVE), None, "integers stored as floats; divide them by 32768"),
        (np.full((1, 6000), 40_000), None, "samples from 0 to 40000 must be 16-bit values"),
        (np.zeros((1, 6000), bool), None, "samples of bool must be int16 or float"),
    ],
)
def test_wrong_waveforms_are_one_line(model, waveforms, lengths, message):
    with pytest.raises(ValueError, match=message):
        model.encode(waveforms, lengths)


def test_what_is_checked_changes_no_result(model):
    """Floats beyond full scale reach the filter bank as they are, and traced ones unchecked."""
    wanted = model.encode(WAVE).hidden_states
    np.testing.assert_array_equal(model.encode(WAVE.astype(np.int64)).hidden_states, wanted)
    loud = np.float32(WAVE) * (50 / np.abs(WAVE).max())
    found = model.encode(loud).hidden_states
    assert np.abs(found - wanted).max() > 1e-3
    np.testing.assert_array_equal(model.encode(jnp.asarray(loud)).hidden_states, found)
    traced = jax.jit(lambda waves: model.encode(waves).hidden_states)
    np.testing.assert_allclose(traced(loud), found, atol=1e-4)


def test_an_encoder_alone_encodes_alike_and_does_not_pretrain(workdir, model):
    encoder = pretrained.read(workdir).encoder_only()
    assert set(encoder.read_weights()[0]) == {"token_projection", "encoder"}
    encoder = encoder.model()
    np.testing.assert_array_equal(
        encoder.encode(WAVE).hidden_states, model.encode(WAVE).hidden_states
    )
    with pytest.raises(ValueError, match="an encoder alone"):
        encoder.pretrain(np.zeros((1, 8, 256)), np.zeros((1, 2), int), np.zeros((1, 6), int))


def test_a_model_reconstructs_what_its_run_draws(workdir, model):
    _, params, statistics = split_model(model)
    state = TrainState(np.int32(0), params, statistics, ())
    draw = make_reconstruct(model.config, seed=3, num_frames=32, count=2)
    wanted = jax.jit(draw)(state, {"audio": WAVE[:, : num_samples(32)]})
    found = model.reconstruct(WAVE, seed=3)  # 36 frames, of which 32 are two patches along time
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert found.original.shape == (2, 32, 128)
    other = model.reconstruct(WAVE, seed=4)
    np.testing.assert_array_equal(other.original, found.original)
    assert np.any(np.isnan(other.masked) != np.isnan(found.masked))


def test_what_cannot_be_reconstructed_is_one_line(workdir, model):
    encoder = pretrained.read(workdir).encoder_only().model()
    with pytest.raises(ValueError, match="an encoder alone"):
        encoder.reconstruct(WAVE)
    with pytest.raises(ValueError, match="at least 2800, the 16 frames"):
        model.reconstruct(WAVE[:, :2000])


def test_a_path_without_a_checkpoint_is_named(tmp_path):
    (tmp_path / "file.safetensors").write_text("words")
    for name, message in [
        ("nowhere.pt", "nowhere.pt does not exist; name a run's workdir"),
        ("file.safetensors", "file.safetensors is not a whole safetensors file"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            maeast_jax.load(tmp_path / name)
        assert "\n" not in str(error.value)


def test_a_cfg_at_odds_with_its_tensors_names_the_file(tmp_path):
    torch = pytest.importorskip("torch")
    saved = torch.load(GOLDEN / "tiny_patch.pt", weights_only=True)
    saved["cfg"]["model"]["encoder_layers"] = 2
    torch.save(saved, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=r"odd.pt: its cfg has no place for the tensor encoder"):
        maeast_jax.load(tmp_path / "odd.pt")


def test_loading_needs_neither_torch_nor_tensorflow():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['tensorflow'] = None\n"
        "import maeast_jax, numpy as np\n"
        f"model = maeast_jax.load({str(GOLDEN / 'tiny_frame.pt')!r})\n"
        "print(model.encode(np.zeros((1, 4000), np.float32)).hidden_states.shape)\n"
        "print(maeast_jax.fbank.fbank(np.zeros(400, np.float32)).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["(3, 1, 11, 64)", "(1, 128)"], done.stderr


def test_the_package_knows_its_modules_and_no_others():
    assert maeast_jax.fbank.NUM_MEL_BANDS == 128
    with pytest.raises(AttributeError, match="module 'maeast_jax' has no attribute 'nothing'"):
        maeast_jax.nothing  # noqa: B018


def training(**model_fields):
    """A configuration of a short training that changes weights by less than rounding."""
    config = tiny.short_config()
    config.optimizer.learning_rate = 1e-12
    config.model.update(model_fields)
    return config


@pytest.mark.slow
def test_training_starts_from_a_file_and_takes_its_architecture(tmp_path, capsys):
    config = training()
    config.init_from = str(GOLDEN / "tiny_frame.pt")
    train(config, tmp_path)
    said = capsys.readouterr().out
    assert "the architecture is that of" in said
    assert "model.encoder_layers 1 -> 3" in said and "model.tokens 'patch' -> 'frame'" in said
    assert "3 + 2 layers of 64" in said and "weights of" in said
    model = pretrained.read(tmp_path)
    assert model.config.tokens == "frame"
    wanted = pretrained.read(config.init_from).read_weights()[0]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), model.read_weights()[0], wanted
    )
    config.total_steps = 8  # the same configuration resumes, although it says patches
    train(config, tmp_path)
    assert "resumed" in capsys.readouterr().out


@pytest.mark.slow
def test_training_from_an_encoder_alone_starts_a_new_decoder(tmp_path, monkeypatch):
    encoder = pretrained.read(GOLDEN / "tiny_patch.pt").encoder_only()
    monkeypatch.setattr(pretrained, "read", lambda path: encoder)
    config = training(decoder_width=32)
    config.init_from = "encoder.pt"
    train(config, tmp_path)
    monkeypatch.undo()
    params, _ = pretrained.read(tmp_path).read_weights()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9),
        params["encoder"], encoder.read_weights()[0]["encoder"],
    )  # fmt: skip
    assert params["mask_token"].shape == (32,)
    scale = params["decoder"]["layers"]["mlp"]["up"]["kernel"].std()
    assert 0.01 < scale < 0.03  # normal(0, 0.02)


def test_training_does_not_resume_from_weights_alone(tmp_path):
    workdir = tmp_path / "weights"
    pretrained.write_workdir(workdir, pretrained.read(GOLDEN / "tiny_patch.pt"))
    with pytest.raises(ValueError, match=r"holds weights alone.*--config.init_from="):
        train(training(), workdir)


@pytest.mark.parametrize("kind", ["run", "file", "folder"])
def test_weights_that_are_not_finite_are_refused(tmp_path, kind):
    """A few bytes that changed on a disk are enough to make every embedding NaN."""
    run = runs.write(tmp_path / "run")
    params, statistics = pretrained.read(run).read_weights()
    params["token_projection"]["bias"] = np.full_like(params["token_projection"]["bias"], np.nan)
    broken = dataclasses.replace(pretrained.read(run), read_weights=lambda: (params, statistics))
    path = tmp_path / {"run": "broken", "file": "x.safetensors", "folder": "folder"}[kind]
    if kind == "run":
        pretrained.write_workdir(path, broken)
    elif kind == "file":
        fairseq.write(path, pretrained.authors_file(broken))
    else:
        huggingface.write(path, pretrained.transformers_folder(broken))
    with pytest.raises(checkpoint.CheckpointError, match="hold NaN or infinity, so every result"):
        pretrained.load(path)
