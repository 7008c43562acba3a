"""The model against the authors' (tests/golden), and against itself computed another way."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maeast_jax.interop import parameters
from maeast_jax.model import transformer
from maeast_jax.model.config import ModelConfig
from maeast_jax.model.mae_ast import MaeAst, model_graph, split_model

TINY = ModelConfig(
    encoder_layers=3,
    decoder_layers=2,
    width=64,
    heads=4,
    mlp_width=128,
    decoder_width=64,
    input_dropout=0.0,
    dropout=0.0,
    attention_dropout=0.0,
    layer_drop=0.0,
)


def authors_model(golden, **changes) -> MaeAst:
    config = dataclasses.replace(TINY, tokens=golden["tokens"], **changes)
    weights = golden["weights"]
    trees = parameters.parameters(weights, config.heads), parameters.statistics(weights)
    return nnx.merge(model_graph(config), *jax.tree.map(jnp.asarray, trees))


def assert_close(actual, expected, relative=1e-4):
    """Within `relative` of the largest value: elements near 0 are sums that cancel."""
    expected = np.asarray(expected)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=relative * np.abs(expected).max())


@pytest.mark.parametrize("unroll", [False, True])
def test_hidden_states_of_padded_features_are_the_authors(golden, unroll):
    values = golden["values"]
    model = authors_model(golden, unroll=unroll)
    out = model.encode_fbank(
        values["features.fbank"], jnp.asarray(values["features.lengths_frames"], jnp.int32)
    )
    np.testing.assert_array_equal(out.padding, values["features.token_padding"])
    for actual, expected in zip(out.hidden_states, values["features.hidden_states"], strict=True):
        assert_close(actual, expected)


def test_hidden_states_of_waveforms_are_the_authors(golden):
    values = golden["values"]
    waves = [values[f"waves.{i}"] for i in range(3)]
    lengths = np.array([len(wave) for wave in waves], np.int32)
    padded = np.stack([np.pad(wave, (0, lengths.max() - len(wave))) for wave in waves])
    out = authors_model(golden).encode(padded, lengths)
    np.testing.assert_array_equal(out.padding, values["waves.token_padding"])
    for actual, expected in zip(out.hidden_states, values["waves.hidden_states"], strict=True):
        assert_close(actual, expected)


def test_hidden_states_do_not_depend_on_what_lies_in_the_padding(golden):
    waves = np.random.default_rng(0).normal(size=(2, 16_000)).astype(np.float32) * 0.1
    lengths = np.array([9_000, 16_000], np.int32)
    model = authors_model(golden)
    clean = model.encode(
        np.where(np.arange(16_000) < lengths[:, None], waves, np.float32(0)), lengths
    )
    dirty = model.encode(waves, lengths)
    real = ~np.asarray(clean.padding)
    assert 0 < real[0].sum() < real[1].sum()
    np.testing.assert_array_equal(clean.hidden_states[:, real], dirty.hidden_states[:, real])


def test_pretraining_pass_is_the_authors(golden):
    values = golden["values"]
    kept = np.sort(values["pretrain.kept"]).astype(np.int32)
    masked = np.sort(values["pretrain.masked"]).astype(np.int32)
    model = authors_model(golden)
    patches = model.normalized_patches(values["fbank"], training=True)
    assert_close(transformer.take_tokens(patches, masked), values["pretrain.target"])
    predictions = model.pretrain(patches, kept, masked)
    assert_close(predictions.reconstruction, values["pretrain.recon"])
    assert_close(predictions.classification, values["pretrain.class"])
    norm = model.input_norm
    np.testing.assert_allclose(norm.mean[...], values["pretrain.bn_mean_after"][0], rtol=1e-5)
    np.testing.assert_allclose(norm.variance[...], values["pretrain.bn_var_after"][0], rtol=1e-5)
    assert norm.num_batches[...] == golden["weights"]["batch_norm.num_batches_tracked"] + 1


def gradients(**changes):
    """Of a scalar of the predictions, with everything drawn that is drawn in training."""
    config = dataclasses.replace(
        TINY, input_dropout=0.1, dropout=0.1, attention_dropout=0.1, layer_drop=0.3, **changes
    )
    graph, params, statistics = split_model(MaeAst(config, nnx.Rngs(0)))
    patches = jax.random.normal(jax.random.key(1), (2, 96, 256))
    kept, masked = random_places()

    @jax.jit
    @jax.grad
    def gradient(params):
        model = nnx.merge(graph, params, statistics)
        out = model.pretrain(patches, kept, masked, jax.random.key(2))
        return jnp.mean(out.reconstruction**2 + out.classification**2)

    return gradient(params)


@pytest.mark.parametrize(("unroll", "remat"), [(True, "none"), (False, "full"), (True, "dots")])
def test_unrolling_and_rematerialising_change_no_gradient(unroll, remat):
    plain = jax.tree.leaves(gradients())
    for got, wanted in zip(
        jax.tree.leaves(gradients(unroll=unroll, remat=remat)), plain, strict=True
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_rematerialising_keeps_less_for_the_backward_pass(remat):
    def kept(**changes):
        encoder = random_model(**changes).encoder
        x = jax.random.normal(jax.random.key(1), (2, 96, 64))
        _, backward = jax.vjp(lambda x: encoder(x)[0], x)
        return sum(leaf.size for leaf in jax.tree.leaves(backward))

    assert kept(remat=remat) < 0.7 * kept()


def random_model(**changes) -> MaeAst:
    return MaeAst(dataclasses.replace(TINY, **changes), nnx.Rngs(0))


def random_places(clips=2, tokens=96, kept=24):
    order = np.argsort(np.random.default_rng(1).random((clips, tokens)), axis=1).astype(np.int32)
    return np.sort(order[:, :kept]), np.sort(order[:, kept:])


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("decoder_layers", [1, 2])
def test_last_decoder_layer_at_masked_places_only_changes_no_result(pre_norm, decoder_layers):
    decoder = random_model(pre_norm=pre_norm, decoder_layers=decoder_layers).decoder
    x = jax.random.normal(jax.random.key(1), (2, 96, 64))
    _, masked = random_places()
    everywhere, _ = decoder(x)
    np.testing.assert_allclose(
        decoder.at_places(x, masked), transformer.take_tokens(everywhere, masked), atol=2e-6
    )


def test_a_last_layer_at_masked_places_only_is_dropped_as_any_other():
    encoder = random_model(layer_drop=0.5, encoder_layers=2).encoder
    x = jax.random.normal(jax.random.key(1), (2, 96, 64))
    _, masked = random_places()
    is_dropped = []
    for seed in range(6):
        everywhere, states = encoder(x, key=jax.random.key(seed))
        is_dropped.append(bool(jnp.all(states[1] == states[0])))
        np.testing.assert_allclose(
            encoder.at_places(x, masked, jax.random.key(seed)),
            transformer.take_tokens(everywhere, masked),
            atol=2e-6,
        )
    assert 0 < sum(is_dropped) < 6


@pytest.mark.parametrize("pre_norm", [False, True])
def test_predictions_see_kept_patches_and_nothing_else(pre_norm):
    model = random_model(pre_norm=pre_norm)
    patches = jax.random.normal(jax.random.key(1), (2, 96, 256))
    kept, masked = random_places()

    def prediction(patches):
        return jnp.sum(model.pretrain(patches, kept, masked).reconstruction[0])

    reach = np.abs(jax.grad(prediction)(patches)).sum(axis=-1)
    assert np.all(reach[0, kept[0]] > 0)
    assert np.all(reach[0, masked[0]] == 0)
    assert np.all(reach[1] == 0), "a clip's predictions depend on another clip"


def test_pre_norm_normalises_after_the_last_layer():
    encoder = random_model(pre_norm=True).encoder
    x = 5.0 + jax.random.normal(jax.random.key(1), (2, 8, 64))
    out, hidden_states = encoder(x)
    np.testing.assert_allclose(np.mean(out, axis=-1), 0, atol=1e-5)
    np.testing.assert_allclose(np.std(out, axis=-1), 1, atol=1e-3)
    assert np.abs(np.mean(hidden_states[-1], axis=-1)).min() > 1


def test_a_narrower_decoder_has_a_projection_and_equal_ones_none():
    model = random_model(decoder_width=32)
    kept, masked = random_places()
    out = model.pretrain(jax.random.normal(jax.random.key(1), (2, 96, 256)), kept, masked)
    assert out.classification.shape == (2, 72, 256)
    assert model.decoder_projection is not None and random_model().decoder_projection is None


def test_bfloat16_keeps_parameters_and_outputs_float32_and_stays_near():
    patches = jax.random.normal(jax.random.key(1), (2, 96, 256))
    kept, masked = random_places()
    exact = random_model().pretrain(patches, kept, masked)
    model = random_model(dtype="bfloat16")
    _, params, statistics = split_model(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    assert statistics["input_norm"]["mean"].dtype == jnp.float32
    rough = model.pretrain(patches, kept, masked)
    assert rough.reconstruction.dtype == jnp.float32
    assert_close(rough.reconstruction, exact.reconstruction, relative=0.03)
    assert np.any(np.asarray(rough.reconstruction) != np.asarray(exact.reconstruction))


def test_dropout_and_layer_drop_need_a_key_and_follow_it():
    model = random_model(input_dropout=0.1, dropout=0.1, attention_dropout=0.1, layer_drop=0.5)
    patches = jax.random.normal(jax.random.key(1), (2, 96, 256))
    kept, masked = random_places()

    def run(key):
        return np.asarray(model.pretrain(patches, kept, masked, key).reconstruction)

    np.testing.assert_array_equal(run(None), run(None))
    np.testing.assert_array_equal(run(jax.random.key(2)), run(jax.random.key(2)))
    assert np.any(run(jax.random.key(2)) != run(jax.random.key(3)))
    assert np.any(run(jax.random.key(2)) != run(None))


def test_layer_drop_of_nearly_all_layers_is_the_identity():
    encoder = random_model(layer_drop=1.0 - 1e-7).encoder
    x = jax.random.normal(jax.random.key(1), (2, 8, 64))
    out, _ = encoder(x, key=jax.random.key(0))
    np.testing.assert_array_equal(out, encoder.norm(x))


def test_initial_values_are_the_authors():
    model = random_model(width=256, heads=4, mlp_width=512, decoder_width=256)
    up = np.asarray(model.encoder.layers.mlp.up.kernel[...])
    assert up.shape == (3, 256, 512)
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": "pixel"}, "model.tokens='pixel' is unknown; known: patch, frame"),
        ({"heads": 5}, "model.width=64 must be even and a multiple of model.heads=5"),
        ({"mask_ratio": 1.0}, "model.mask_ratio=1.0 must lie between 0 and 1"),
        ({"dropout": 1.0}, r"model.dropout=1.0 must be in \[0, 1\)"),
        ({"encoder_layers": 0}, "model.encoder_layers=0 must be at least 1"),
        ({"remat": "some"}, "model.remat='some' is unknown; known: none, dots, full"),
    ],
)
def test_values_that_do_not_fit_are_one_line(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_clips_of_broken_tokens_are_refused():
    with pytest.raises(ValueError, match="num_frames=1000 must be a multiple of 16"):
        TINY.grid(1000)
    assert TINY.grid(1024) == (64, 8)
    assert dataclasses.replace(TINY, tokens="frame").grid(1024) == (512, 1)
