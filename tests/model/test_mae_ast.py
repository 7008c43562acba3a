"""MAE-AST against the authors' (tests/golden), and both models against what they promise."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny import (
    CONFIGS,
    assert_close,
    authors_config,
    load,
    model_config,
    random_places,
    shrink,
)

from maeast_jax import checkpoint
from maeast_jax import config as configuration
from maeast_jax.export import export
from maeast_jax.inference import pretrained
from maeast_jax.interop import parameters
from maeast_jax.model import masking, tokens, transformer
from maeast_jax.model.mae_ast import MaeAst, abstract_model, build, model_graph, split_model
from maeast_jax.runtime import processor
from maeast_jax.train import train
from maeast_jax.training import metrics_writer
from maeast_jax.training.steps import LossConfig, init_state, make_eval_step, make_train_step

SMALL = model_config(
    encoder_layers=2, decoder_layers=1, width=32, heads=2, mlp_width=48, decoder_width=32,
    input_dropout=0.0, dropout=0.0, attention_dropout=0.0, layer_drop=0.0, mask="random",
)  # fmt: skip
SSAST = dataclasses.replace(SMALL, architecture="ssast", decoder_layers=0)
LOSS = LossConfig(mse=10.0, info_nce=1.0)
FRAMES = 192
PATCHES = jax.random.normal(jax.random.key(1), (2, 96, 256))
KEPT, MASKED = random_places()


@pytest.fixture(scope="module")
def authors_model(golden) -> MaeAst:
    config = authors_config(golden["tokens"])
    weights = golden["weights"]
    trees = parameters.parameters(weights, config.heads), parameters.statistics(weights)
    return nnx.merge(model_graph(config), *jax.tree.map(jnp.asarray, trees))


def draw_model(config=SMALL, **changes):
    config = dataclasses.replace(config, **changes)
    return nnx.jit(lambda: build(config, nnx.Rngs(0)))()


@nnx.jit
def pretrain(model, patches, key=None):
    return model.pretrain(patches, KEPT, MASKED, key)


def test_hidden_states_of_padded_features_are_the_authors(golden, authors_model):
    values = golden["values"]
    encode = nnx.jit(lambda model, log_mel, lengths: model.encode_fbank(log_mel, lengths))
    out = encode(
        authors_model,
        values["features.fbank"],
        jnp.asarray(values["features.lengths_frames"], jnp.int32),
    )
    np.testing.assert_array_equal(out.padding, values["features.token_padding"])
    for actual, expected in zip(out.hidden_states, values["features.hidden_states"], strict=True):
        assert_close(actual, expected)


def test_hidden_states_of_waveforms_are_the_authors_whatever_lies_in_the_padding(
    golden, authors_model
):
    values = golden["values"]
    waves = [values[f"waves.{i}"] for i in range(3)]
    lengths = np.array([len(wave) for wave in waves], np.int32)
    padded = np.stack([np.pad(wave, (0, lengths.max() - len(wave))) for wave in waves])
    out = authors_model.encode(padded, lengths)
    np.testing.assert_array_equal(out.padding, values["waves.token_padding"])
    for actual, expected in zip(out.hidden_states, values["waves.hidden_states"], strict=True):
        assert_close(actual, expected)
    is_padding = np.arange(lengths.max()) >= lengths[:, None]
    noise = np.random.default_rng(0).normal(size=padded.shape).astype(np.float32)
    noisy = authors_model.encode(np.where(is_padding, noise, padded), lengths)
    is_real = ~np.asarray(out.padding)
    np.testing.assert_array_equal(out.hidden_states[:, is_real], noisy.hidden_states[:, is_real])


def test_the_pretraining_pass_is_the_authors(golden, authors_model):
    values = golden["values"]
    kept = np.sort(values["pretrain.kept"]).astype(np.int32)
    masked = np.sort(values["pretrain.masked"]).astype(np.int32)

    @nnx.jit
    def run(model, log_mel):
        patches = model.normalized_patches(log_mel, training=True)
        return transformer.take_tokens(patches, masked), model.pretrain(patches, kept, masked)

    model = nnx.clone(authors_model)
    target, predictions = run(model, values["fbank"])
    assert_close(target, values["pretrain.target"])
    assert_close(predictions.reconstruction, values["pretrain.recon"])
    assert_close(predictions.classification, values["pretrain.class"])
    norm = model.input_norm
    np.testing.assert_allclose(norm.mean[...], values["pretrain.bn_mean_after"][0], rtol=1e-5)
    np.testing.assert_allclose(norm.variance[...], values["pretrain.bn_var_after"][0], rtol=1e-5)
    assert norm.num_batches[...] == golden["weights"]["batch_norm.num_batches_tracked"] + 1


@pytest.mark.parametrize("config", [SMALL, SSAST], ids=["mae_ast", "ssast"])
def test_predictions_see_kept_patches_and_nothing_else(config):
    model = draw_model(config)

    @jax.jit
    @jax.grad
    def reach(patches):
        return jnp.sum(model.pretrain(patches, KEPT, MASKED).reconstruction[0])

    found = np.abs(reach(PATCHES)).sum(axis=-1)
    assert np.all(found[0, KEPT[0]] > 0)
    assert np.all(found[0, MASKED[0]] == 0)
    assert np.all(found[1] == 0), "a clip's predictions depend on another clip"


def test_ssast_puts_the_mask_token_in_place_of_masked_patches():
    model = draw_model(SSAST)
    is_masked = np.zeros((2, 96, 1), bool)
    np.put_along_axis(is_masked, MASKED[..., None], True, axis=1)

    @nnx.jit
    def run(model):
        embedded = jnp.where(is_masked, model.mask_token[...], model.token_projection(PATCHES))
        seen, _ = model.encoder(embedded + tokens.sinusoid(96, 32))
        rows = transformer.take_tokens(seen, MASKED)
        wanted = model.reconstruction_head(rows), model.classification_head(rows)
        return model.pretrain(PATCHES, KEPT, MASKED), wanted

    for found, wanted in zip(*run(model), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_bfloat16_keeps_parameters_and_outputs_float32_and_stays_near():
    exact = pretrain(draw_model(), PATCHES)
    model = draw_model(dtype="bfloat16")
    _, params, statistics = split_model(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    assert statistics["input_norm"]["mean"].dtype == jnp.float32
    rough = pretrain(model, PATCHES)
    assert rough.reconstruction.dtype == jnp.float32
    assert_close(rough.reconstruction, exact.reconstruction, relative=0.03)


@pytest.mark.parametrize(("multiplies", "factor"), [(True, "bf16"), (False, "f32")])
def test_every_product_has_the_factors_that_suit_the_cpu(monkeypatch, multiplies, factor):
    monkeypatch.setattr(processor, "multiplies_bfloat16", lambda: multiplies)
    config = dataclasses.replace(SMALL, dtype="bfloat16")
    graph = model_graph(config)
    _, params, statistics = split_model(abstract_model(config))

    def loss(params, statistics, patches):
        out = nnx.merge(graph, params, statistics).pretrain(patches, KEPT, MASKED)
        return jnp.sum(out.reconstruction + out.classification)

    text = jax.jit(jax.grad(loss)).lower(params, statistics, PATCHES).as_text()
    products = [line.split(" : ")[-1] for line in text.splitlines() if "dot_general" in line]
    assert len(products) > 20
    for product in products:
        assert re.findall(r"x(b?f\d+)>", product) == [factor, factor, "f32"]


def test_dropout_and_layer_drop_need_a_key_and_follow_it():
    model = draw_model(input_dropout=0.1, dropout=0.1, attention_dropout=0.1, layer_drop=0.5)

    def run(key):
        return np.asarray(pretrain(model, PATCHES, key).reconstruction)

    plain, drawn, other = run(None), run(jax.random.key(2)), run(jax.random.key(3))
    np.testing.assert_array_equal(drawn, run(jax.random.key(2)))
    assert np.any(drawn != other) and np.any(drawn != plain)


def test_initial_values_are_the_authors():
    model = draw_model(width=128, heads=4, mlp_width=512, decoder_width=128)
    up = np.asarray(model.encoder.layers.mlp.up.kernel[...])
    assert up.shape == (2, 128, 512)
    np.testing.assert_allclose(up.std(), 0.02, rtol=0.02)
    assert np.any(up[0] != up[1]), "layers start equal"
    np.testing.assert_allclose(
        model.encoder.layers.attention.qkv_kernel[...].std(), 0.02, rtol=0.02
    )
    assert np.all(np.asarray(model.encoder.layers.mlp.up.bias[...]) == 0)
    projection = np.asarray(model.token_projection.kernel[...])
    np.testing.assert_allclose(np.abs(projection).max(), 1 / 16, rtol=0.01)
    np.testing.assert_allclose(projection.std(), 1 / 16 / np.sqrt(3), rtol=0.02)
    mask_token = np.asarray(model.mask_token[...])
    assert mask_token.min() >= 0 and 0.9 < mask_token.max() < 1


def test_with_two_passes_each_loss_has_a_mask_of_its_own(monkeypatch):
    """The terms are those of single passes on the first and on the second mask."""
    batch = {
        "fbank": np.random.default_rng(0).normal(size=(2, FRAMES, 128)).astype(np.float32),
        "mask": np.ones(2, bool),
    }
    state = init_state(SMALL, optax.identity(), 0)
    kept_and_masked = [(KEPT, MASKED), (KEPT[::-1], MASKED[::-1])]

    def terms(state, passes, masks):
        given = iter(masks)
        monkeypatch.setattr(masking, "mask_tokens", lambda *_: next(given))
        config = dataclasses.replace(SMALL, passes=passes)
        evaluate = make_eval_step(config, LOSS, seed=0, num_frames=FRAMES)
        return evaluate(state, batch, np.int32(0))

    first, second, both = jax.jit(
        lambda state: (
            terms(state, 1, kept_and_masked[:1]),
            terms(state, 1, kept_and_masked[1:]),
            terms(state, 2, kept_and_masked),
        )
    )(state)
    assert abs(first["info_nce"][0] - second["info_nce"][0]) > 1e-3
    np.testing.assert_allclose(both["mse"][0], first["mse"][0], rtol=1e-5)
    np.testing.assert_allclose(both["info_nce"][0], second["info_nce"][0], rtol=1e-5)
    np.testing.assert_allclose(
        both["loss"][0], 10 * both["mse"][0] + both["info_nce"][0], rtol=1e-5
    )


@pytest.mark.slow
def test_two_passes_draw_two_masks_and_accumulate():
    """Without dropout, a batch in parts gives the step of the whole batch."""
    config = dataclasses.replace(SSAST, passes=2)
    optimizer = optax.sgd(0.1)
    batch = {"fbank": np.random.default_rng(0).normal(size=(4, FRAMES, 128)).astype(np.float32)}
    ends = []
    for parts in (1, 2):
        step = make_train_step(
            config, LOSS, optimizer, lambda _: 0.1, seed=0, num_frames=FRAMES,
            accumulation_steps=parts,
        )  # fmt: skip
        ends.append(jax.jit(step)(init_state(config, optimizer, 0), batch)[0].params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *ends)


@pytest.fixture(scope="module")
def ssast_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ssast")
    config = shrink(load(CONFIGS / "ssast.py"), steps=30)
    config.optimizer.learning_rate = 3e-3
    config.log_every = 1
    train(config, folder)
    return folder


@pytest.mark.slow
def test_ssast_trains_as_any_run_does(ssast_run):
    losses = [
        row["loss"] for row in metrics_writer.read_metrics(ssast_run) if row["split"] == "train"
    ]
    assert len(losses) == 30 and losses[-1] < 0.7 * losses[0]


@pytest.mark.slow
def test_ssasts_encoder_is_used_as_mae_asts_is(ssast_run, tmp_path):
    model = pretrained.load(ssast_run)
    waveform = np.random.default_rng(0).normal(size=(1, 16_000)).astype(np.float32) * 0.1
    encoding = model.encode(waveform)
    assert encoding.hidden_states.shape == (1, 1, 48, 16)
    with pytest.raises(ValueError, match=r"SSAST model.*add --encoder_only"):
        export(ssast_run, tmp_path / "x.safetensors")
    export(ssast_run, tmp_path / "x.safetensors", encoder_only=True)
    back = pretrained.load(tmp_path / "x.safetensors").encode(waveform)
    # A run's layers are unrolled, a file's a scan: the same sums, compiled otherwise.
    np.testing.assert_allclose(back.hidden_states, encoding.hidden_states, atol=1e-5)


@pytest.mark.slow
def test_a_run_of_the_other_architecture_does_not_go_on_from_it(ssast_run):
    config = shrink(configuration.pretrain(), steps=40)
    with pytest.raises(checkpoint.CheckpointError, match="architecture='ssast', the config"):
        train(config, ssast_run)
