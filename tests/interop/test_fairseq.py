"""Files of the authors' layout: the model of a file, faulty files, and the file of a model."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny

from maeast_jax.interop import fairseq
from maeast_jax.interop.fairseq import AuthorsFile, AuthorsFileError
from maeast_jax.model import abstract_model, split_model, tokens

CONFIG = tiny.model_config(
    encoder_layers=2, decoder_layers=1, width=16, heads=2, mlp_width=32, decoder_width=16
)


def split(config):
    """Random (parameters, statistics) of a model."""
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: np.asarray(random.normal(size=leaf.shape), leaf.dtype),
        split_model(abstract_model(config))[1:],
    )


def build(config):
    return fairseq.build(config, *split(config), num_frames=96, max_token_length=40)


@pytest.fixture(scope="module")
def file():
    return build(CONFIG)


def change(file: AuthorsFile, **fields) -> AuthorsFile:
    """The file with other fields of cfg; None removes a field."""
    cfg = {part: dict(section) for part, section in file.cfg.items()}
    for name, value in fields.items():
        part = "task" if name in cfg["task"] else "model"
        cfg[part][name] = value
        if value is None:
            del cfg[part][name]
    return AuthorsFile(cfg, dict(file.tensors))


def test_the_architecture_is_taken_from_cfg(file):
    file = change(
        file,
        ast_kernel_size_time=8, ast_kernel_stride_time=8,
        ast_kernel_size_chan=32, ast_kernel_stride_chan=32,
        encoder_layers=5, encoder_embed_dim=24, encoder_ffn_embed_dim=40, encoder_attention_heads=3,
        layer_norm_first=True, decoder_embed_dim=12, decoder_layers=4, use_post_enc_proj=True,
        dropout=0.2, attention_dropout=0.3, encoder_layerdrop=0.4, dropout_input=0.5,
        random_mask_prob=0.6, mask_type="random_mask_batched",
    )  # fmt: skip
    assert fairseq.model_config(file) == tiny.model_config(
        tokens="8x32", encoder_layers=5, width=24, mlp_width=40, heads=3, pre_norm=True,
        decoder_width=12, decoder_layers=4, decoder_projection=True, dropout=0.2,
        attention_dropout=0.3, layer_drop=0.4, input_dropout=0.5, mask_ratio=0.6, mask="random",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder_attention_heads": None}, "cfg.model.encoder_attention_heads is missing"),
        ({"activation_fn": "relu"}, "cfg.model.activation_fn='relu', but only 'gelu' is built"),
        ({"dec_sine_pos": False}, "cfg.model.dec_sine_pos=False, but only True"),
        ({"feature_dim": 80}, "cfg.task.feature_dim=80, but only 128"),
        ({"ast_kernel_stride_time": 10}, r"\[16, 16\] with strides \[10, 16\]"),
        ({"mask_type": "stripes"}, "cfg.task.mask_type='stripes' is unknown; known: chunk_mask"),
        ({"encoder_attention_heads": 3}, "model.width=16 must be even and a multiple of"),
    ],
    ids=str,
)
def test_a_model_that_is_not_built_here_is_refused(file, fields, message):
    with pytest.raises(ValueError, match=message):
        fairseq.model_config(change(file, **fields))


def test_tensors_that_do_not_fit_the_cfg_are_named(file):
    name, table = "encoder.layers.1.fc1.weight", "enc_sine_pos_embed.pe"
    found = file.tensors[table]
    for change, message in [
        ({name: None}, f"tensor {name} is missing"),
        ({name: np.zeros((33, 16))}, rf"{name} is \[33, 16\], but its cfg makes it \[32, 16\]"),
        ({"label_embs": np.zeros(3)}, "no place for the tensor label_embs"),
        ({table: found * np.float32(1.01)}, f"{table} does not hold the sinusoid"),
    ]:
        tensors = {k: v for k, v in (file.tensors | change).items() if v is not None}
        with pytest.raises(AuthorsFileError, match=message):
            fairseq.weights(AuthorsFile(file.cfg, tensors), CONFIG)


def test_the_length_of_the_clips_is_kept(file):
    assert fairseq.num_frames(file) == 96
    assert fairseq.num_frames(change(file, max_sample_size=None)) is None


def test_half_precision_is_read_as_float32_and_its_position_table_is_dropped(file):
    table = "enc_sine_pos_embed.pe"
    assert table in fairseq.extras(file)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        half = AuthorsFile(
            file.cfg,
            {n: t.astype(dtype) if t.dtype == np.float32 else t for n, t in file.tensors.items()},
        )
        params, statistics = fairseq.weights(half, CONFIG)
        floats = [leaf for leaf in jax.tree.leaves((params, statistics)) if leaf.dtype != np.int32]
        assert {leaf.dtype for leaf in floats} == {np.dtype(np.float32)}
        wanted = half.tensors["post_extract_proj.weight"].T.astype(np.float32)
        np.testing.assert_array_equal(params["token_projection"]["kernel"], wanted)
        assert table not in fairseq.extras(half)


def test_a_file_without_a_decoder_is_an_encoder():
    file = build(dataclasses.replace(CONFIG, decoder_width=8))
    encoder = {
        name: tensor
        for name, tensor in file.tensors.items()
        if not name.startswith(("decoder.", "final_proj", "post_enc"))
    }
    file = AuthorsFile(file.cfg, encoder)
    config = fairseq.model_config(file)
    assert config.is_encoder_only and config.decoder_width == 16
    params, _ = fairseq.weights(file, config)
    assert set(params) == {"token_projection", "encoder"}


@pytest.mark.parametrize(
    "changes",
    [
        {"mask": "random", "mask_ratio": 0.1, "pre_norm": True, "layer_drop": 0.3},
        {"mask": "span", "mask_ratio": 0.3, "decoder_width": 8},
    ],
    ids=str,
)
def test_the_file_of_a_model_reads_back_as_the_model(changes):
    config = dataclasses.replace(CONFIG, **changes)
    file = build(config)
    back = fairseq.model_config(file)
    assert back == dataclasses.replace(config, decoder_projection=config.projects_to_decoder)
    jax.tree.map(np.testing.assert_array_equal, fairseq.weights(file, back), split(config))


def test_position_tables_are_as_long_as_cfg_says_and_idle_tensors_are_there():
    tensors = build(dataclasses.replace(CONFIG, decoder_width=8)).tensors
    np.testing.assert_array_equal(tensors["enc_sine_pos_embed.pe"], tokens.sinusoid(40, 16)[None])
    np.testing.assert_array_equal(tensors["dec_sine_pos_embed.pe"], tokens.sinusoid(40, 8)[None])
    assert tensors["encoder_mask_emb"].shape == (16,)
    assert tensors["layer_norm.weight"].shape == tensors["layer_norm.bias"].shape == (128,)
    assert tensors["batch_norm.num_batches_tracked"].dtype == np.int64


def test_the_file_of_an_encoder_alone_has_no_decoder():
    file = build(dataclasses.replace(CONFIG, decoder_layers=0))
    assert file.cfg["model"]["decoder_layers"] == 0
    assert not any(name.startswith(("decoder.layers", "dec_sine")) for name in file.tensors)
    assert fairseq.model_config(file).is_encoder_only


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_a_written_file_reads_back_and_other_programs_find_what_they_expect(file, tmp_path, name):
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors")
    tensors = file.tensors | {"layer_norm.bias": np.arange(256, dtype=np.float32)[::2]}
    fairseq.write(tmp_path / name, AuthorsFile(file.cfg, tensors))
    back = fairseq.read(tmp_path / name)
    assert back.cfg == file.cfg
    assert {n: (t.dtype, t.shape, t.tobytes()) for n, t in back.tensors.items()} == {
        n: (t.dtype, t.shape, t.tobytes()) for n, t in tensors.items()
    }
    if name == "x.pt":
        saved = torch.load(tmp_path / name, weights_only=True)
        assert saved["cfg"] == file.cfg and set(saved["model"]) == set(tensors)
        return
    with safetensors.safe_open(tmp_path / name, "pt") as opened:
        assert opened.metadata()["format"] == "pt"
        assert json.loads(opened.metadata()["config"]) == file.cfg


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weights": 1}, r"x.pt: expected a dict with the keys cfg, model, found \['weights'\]"),
        ({"cfg": {"model": {}}, "model": {}}, "has no cfg.task, so its architecture is unknown"),
        ({"cfg": None, "model": {}}, "has no cfg.model"),
    ],
    ids=str,
)
def test_another_kind_of_file_is_refused(tmp_path, content, message):
    torch = pytest.importorskip("torch")
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        fairseq.read(tmp_path / "x.pt")
