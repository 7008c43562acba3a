"""Files of the authors' layout: what their cfg means, what is wrong with one, and one of ours."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from maeast_jax.interop import authors_config, fairseq
from maeast_jax.interop.authors_config import AuthorsFileError
from maeast_jax.interop.fairseq import AuthorsFile
from maeast_jax.model import MaeAst, ModelConfig, split_model, tokens

CONFIG = ModelConfig(
    encoder_layers=2, decoder_layers=1, width=16, heads=2, mlp_width=32, decoder_width=16
)


def build(config=CONFIG, **options):
    _, params, statistics = split_model(MaeAst(config, nnx.Rngs(0)))
    return fairseq.build(config, params, statistics, num_frames=96, max_token_length=40, **options)


def config_of(file):
    return authors_config.model_config(file.cfg, file.has_decoder)


def change(file: AuthorsFile, **fields) -> AuthorsFile:
    cfg = {part: dict(section) for part, section in file.cfg.items()}
    for name, value in fields.items():
        part = "task" if name in cfg["task"] else "model"
        cfg[part][name] = value
        if value is None:
            del cfg[part][name]
    return AuthorsFile(cfg, dict(file.tensors))


def test_the_architecture_is_taken_from_cfg():
    file = change(
        build(),
        ast_kernel_size_time=8, ast_kernel_stride_time=8,
        ast_kernel_size_chan=32, ast_kernel_stride_chan=32,
        encoder_layers=5, encoder_embed_dim=24, encoder_ffn_embed_dim=40, encoder_attention_heads=3,
        layer_norm_first=True, decoder_embed_dim=12, decoder_layers=4, use_post_enc_proj=True,
        dropout=0.2, attention_dropout=0.3, encoder_layerdrop=0.4, dropout_input=0.5,
        random_mask_prob=0.6, mask_type="random_mask_batched",
    )  # fmt: skip
    assert config_of(file) == ModelConfig(
        tokens="8x32", encoder_layers=5, width=24, mlp_width=40, heads=3, pre_norm=True,
        decoder_width=12, decoder_layers=4, decoder_projection=True, dropout=0.2,
        attention_dropout=0.3, layer_drop=0.4, input_dropout=0.5, mask_ratio=0.6, mask="random",
    )  # fmt: skip


def test_the_golden_files_are_read_as_they_were_made(golden):
    cfg = golden["cfg"]
    file = AuthorsFile({"model": cfg, "task": {"mask_type": "chunk_mask"}}, golden["weights"])
    config = config_of(file)
    assert (config.tokens, config.encoder_layers, config.width) == (golden["tokens"], 3, 64)
    fairseq.weights(file, config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder_attention_heads": None}, "cfg.model.encoder_attention_heads is missing"),
        ({"activation_fn": "relu"}, "cfg.model.activation_fn='relu', but only 'gelu' is built"),
        ({"enc_conv_pos": True}, "cfg.model.enc_conv_pos=True, but only False"),
        ({"dec_sine_pos": False}, "cfg.model.dec_sine_pos=False, but only True"),
        ({"feature_dim": 80}, "cfg.task.feature_dim=80, but only 128"),
        ({"sample_rate": 8000}, "cfg.task.sample_rate=8000, but only 16000"),
        ({"ast_kernel_stride_time": 10}, r"\(16, 16\) with strides \(10, 16\)"),
        ({"mask_type": "stripes"}, "cfg.task.mask_type='stripes' is unknown; known: chunk_mask"),
        ({"encoder_attention_heads": 3}, "model.width=16 must be even and a multiple of"),
        ({"encoder_layers": "3"}, "cfg.model.encoder_layers='3' must be int"),
        ({"encoder_layers": 3.0}, "cfg.model.encoder_layers=3.0 must be int"),
        ({"layer_norm_first": 1}, "cfg.model.layer_norm_first=1 must be bool"),
        ({"random_mask_prob": "x"}, "cfg.model.random_mask_prob='x' must be float"),
        ({"mask_type": ["chunk"]}, r"cfg.task.mask_type=\['chunk'\] must be str"),
        ({"ast_kernel_size_time": [16]}, r"cfg.model.ast_kernel_size_time=\[16\] must be int"),
    ],
    ids=str,
)
def test_a_model_that_is_not_built_here_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        config_of(change(build(), **fields))


def test_tensors_that_do_not_fit_the_cfg_are_named():
    file = build()
    config = config_of(file)
    name = "encoder.layers.1.fc1.weight"
    missing = AuthorsFile(file.cfg, {n: t for n, t in file.tensors.items() if n != name})
    with pytest.raises(AuthorsFileError, match=f"tensor {name} is missing"):
        fairseq.weights(missing, config)
    wider = AuthorsFile(file.cfg, file.tensors | {name: np.zeros((33, 16))})
    with pytest.raises(AuthorsFileError, match=rf"{name} is \[33, 16\], but its cfg makes it \[32"):
        fairseq.weights(wider, config)
    more = AuthorsFile(file.cfg, file.tensors | {"label_embs": np.zeros(3)})
    with pytest.raises(AuthorsFileError, match="no place for the tensor label_embs"):
        fairseq.weights(more, config)
    table = file.tensors["enc_sine_pos_embed.pe"] * np.float32(1.01)
    other = AuthorsFile(file.cfg, file.tensors | {"enc_sine_pos_embed.pe": table})
    with pytest.raises(AuthorsFileError, match=r"enc_sine_pos_embed.pe does not hold the sinusoid"):
        fairseq.weights(other, config)
    flat = AuthorsFile(file.cfg, file.tensors | {"enc_sine_pos_embed.pe": table[0]})
    with pytest.raises(AuthorsFileError, match=r"pe is \[40, 16\], expected \[1, positions, 16\]"):
        fairseq.weights(flat, config)


def test_the_clips_length_goes_along():
    assert authors_config.num_frames(build().cfg) == 96
    assert authors_config.num_frames(change(build(), max_sample_size=None).cfg) is None
    for wrong, message in ((100, "must be a frame at least, 400"), ("160000", "must be int")):
        with pytest.raises(AuthorsFileError, match=message):
            authors_config.num_frames(change(build(), max_sample_size=wrong).cfg)


def test_a_table_of_half_precision_is_not_kept():
    file = build()
    name = "enc_sine_pos_embed.pe"
    assert name in fairseq.extras(file)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        half = AuthorsFile(file.cfg, file.tensors | {name: file.tensors[name].astype(dtype)})
        fairseq.weights(half, config_of(half))
        assert name not in fairseq.extras(half)


def test_half_precision_is_read_as_float32():
    file = build()
    half = {
        name: tensor.astype(np.float16) if tensor.dtype == np.float32 else tensor
        for name, tensor in file.tensors.items()
    }
    params, statistics = fairseq.weights(AuthorsFile(file.cfg, half), CONFIG)
    floats = [leaf for leaf in jax.tree.leaves((params, statistics)) if leaf.dtype != np.int32]
    assert {leaf.dtype for leaf in floats} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(
        params["token_projection"]["kernel"],
        file.tensors["post_extract_proj.weight"].T.astype(np.float16),
    )


@pytest.mark.parametrize("leave", [(), ("dec_sine_pos_embed.pe", "decoder_mask_emb")])
def test_a_file_without_a_decoder_is_an_encoder(leave):
    file = build(dataclasses.replace(CONFIG, decoder_width=8))
    encoder = {
        name: tensor
        for name, tensor in file.tensors.items()
        if not name.startswith(("decoder.", "final_proj", "post_enc")) and name not in leave
    }
    file = AuthorsFile(file.cfg, encoder)
    config = config_of(file)
    assert config.is_encoder_only and config.decoder_width == 16
    params, _ = fairseq.weights(file, config)
    assert set(params) == {"token_projection", "encoder"}


@pytest.mark.parametrize("ratio", [0.75, 0.1, 0.3])
@pytest.mark.parametrize("mask", ["random", "chunk", "span"])
@pytest.mark.parametrize("changes", [{}, {"decoder_width": 8}, {"pre_norm": True}], ids=str)
def test_what_is_written_reads_back(mask, ratio, changes):
    config = dataclasses.replace(CONFIG, mask=mask, mask_ratio=ratio, **changes)
    file = build(config)
    back = config_of(file)
    assert back == dataclasses.replace(config, decoder_projection=config.projects_to_decoder)
    _, params, statistics = split_model(MaeAst(config, nnx.Rngs(0)))
    jax.tree.map(np.testing.assert_array_equal, fairseq.weights(file, back), (params, statistics))


def test_position_tables_are_as_long_as_cfg_says_and_idle_tensors_are_there():
    config = dataclasses.replace(CONFIG, decoder_width=8)
    tensors = build(config).tensors
    np.testing.assert_array_equal(tensors["enc_sine_pos_embed.pe"], tokens.sinusoid(40, 16)[None])
    np.testing.assert_array_equal(tensors["dec_sine_pos_embed.pe"], tokens.sinusoid(40, 8)[None])
    assert tensors["encoder_mask_emb"].shape == (16,)
    assert tensors["layer_norm.weight"].shape == tensors["layer_norm.bias"].shape == (128,)
    assert tensors["batch_norm.num_batches_tracked"].dtype == np.int64


def test_an_encoder_alone_holds_no_more_than_strict_loading_needs():
    config = dataclasses.replace(CONFIG, decoder_layers=0)
    file = build(config)
    assert file.cfg["model"]["decoder_layers"] == 0
    assert not any(name.startswith(("decoder.layers", "dec_sine")) for name in file.tensors)
    assert config_of(file).is_encoder_only


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weights": 1}, r"x.pt: expected a dict with the keys cfg, model, found \['weights'\]"),
        ([1], "x.pt: expected a dict with the keys cfg, model, found no dict"),
        ({"cfg": {"model": {}, "task": {"a": b"bytes"}}, "model": {}}, "more than plain values"),
        ({"cfg": {"model": {}, "task": {}}, "model": [1]}, "model is a list, not named tensors"),
        ({"cfg": {"model": {}, "task": {}}, "model": {"a": 1}}, "model.a is a int, not a tensor"),
        ({"cfg": {"model": {}}, "model": {}}, "holds no cfg.task"),
        ({"cfg": None, "model": {}}, "holds no cfg.model"),
    ],
    ids=str,
)
def test_another_kind_of_file_is_refused(tmp_path, content, message):
    torch = pytest.importorskip("torch")
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        fairseq.read(tmp_path / "x.pt")


def test_a_broken_safetensors_file_is_refused(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"not one")
    with pytest.raises(AuthorsFileError, match=r"x.safetensors is not a whole safetensors file"):
        fairseq.read(tmp_path / "x.safetensors")
