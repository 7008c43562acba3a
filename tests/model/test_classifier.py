"""The classifier against numpy, against other encoders, and against itself in other batches."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import head_config, model_config

from maeast_jax.inference import pretrained
from maeast_jax.model import classifier as classifiers
from maeast_jax.model.classifier import Classifier, Head
from maeast_jax.model.mae_ast import split_model
from maeast_jax.runtime import processor

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = model_config(
    encoder_layers=3, decoder_layers=0, width=16, heads=2, mlp_width=24, decoder_width=16,
    input_dropout=0.0, dropout=0.0, attention_dropout=0.0, layer_drop=0.0,
)  # fmt: skip
CLASSES = 5
SSAST = head_config(pool="mean")
SUPERB = head_config(kind="superb", layer="weighted", pool="time", projection=7)


@functools.cache
def build(head=SSAST, **changes):
    """A classifier that no test changes."""
    config = dataclasses.replace(TINY, **changes)
    classifier = nnx.jit(lambda: Classifier(config, head, CLASSES, nnx.Rngs(0)))()
    classifier.backbone.input_norm.set_statistics(-5.0, 3.0)
    if classifier.head.layer_weights is not None:
        classifier.head.layer_weights[...] = jnp.array([0.5, -1.0, 0.0])
    return classifier


def energies(clips=3, frames=80):
    """Log energies with something in the padding."""
    return np.random.default_rng(1).normal(-5, 3, (clips, frames, 128)).astype(np.float32)


@nnx.jit
def logits(classifier, log_mel, lengths, key=None):
    return classifier(classifier.normalize(log_mel, lengths), lengths, key)


@pytest.mark.parametrize(("head", "tokens"), [(SSAST, "frame"), (SUPERB, "patch")])
def test_a_clips_logits_are_those_of_the_clip_alone(head, tokens):
    classifier = build(head, tokens=tokens)
    lengths = np.array([1, 5, 16, 33, 79, 80], np.int32)
    log_mel = energies(len(lengths))
    together = np.asarray(logits(classifier, log_mel, lengths))
    assert together.shape == (len(lengths), CLASSES) and together.dtype == np.float32
    assert np.std(together, axis=0).min() > 1e-3, "all clips look alike"
    for n in (1, 3):
        alone = logits(classifier, log_mel[n : n + 1, : lengths[n]], lengths[n : n + 1])
        np.testing.assert_allclose(together[n], alone[0], atol=1e-5)


@pytest.mark.parametrize("head", [SSAST, SUPERB])
def test_heads_are_what_numpy_computes(head):
    """In the recipes' own order: every step is weighed and projected, then averaged."""
    classifier = build(head)
    log_mel, lengths = energies(), np.full(3, 80, np.int32)
    encode = nnx.jit(lambda model: model.encode_fbank(log_mel, lengths).hidden_states)
    states = np.asarray(encode(classifier.backbone))
    if head.layer == "weighted":
        weights = np.exp([0.5, -1.0, 0.0]) / np.exp([0.5, -1.0, 0.0]).sum()
        states = np.tensordot(weights, states, axes=1)
    else:
        states = states[-1]
    # 80 frames are 5 time steps of 8 patches, which pool "time" takes side by side.
    tokens = states.reshape(3, 5, -1) if head.pool == "time" else states
    part = classifier.head

    def linear(layer, x):
        return x @ np.asarray(layer.kernel[...], np.float64) + np.asarray(layer.bias[...])

    if head.kind == "superb":
        expected = linear(part.output, linear(part.projection, tokens).mean(axis=1))
    else:
        x = tokens.mean(axis=1)
        x = x - x.mean(axis=1, keepdims=True)
        x = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + 1e-5)
        expected = linear(part.output, x)
    np.testing.assert_allclose(logits(classifier, log_mel, lengths), expected, atol=1e-5)


def test_a_numbered_layer_is_the_encoder_cut_off_above_it():
    """The same as a weighted sum with all weight on that layer."""
    _, params, statistics = split_model(build(SSAST).backbone)
    heads = [head_config(layer=layer, pool="mean") for layer in (0, "weighted")]
    cut, weighted = (nnx.clone(build(head)) for head in heads)
    for classifier in (cut, weighted):
        classifier.load_backbone(params, statistics)
    weighted.head.layer_weights[...] = jnp.array([100.0, 0.0, 0.0])
    assert cut.backbone.config.encoder_layers == 1
    inputs = energies(), np.full(3, 80, np.int32)
    np.testing.assert_allclose(logits(cut, *inputs), logits(weighted, *inputs), atol=1e-5)


@pytest.mark.parametrize(("head", "pre_norm"), [(SSAST, True), (SUPERB, False)])
def test_gradients_reach_every_parameter(head, pre_norm):
    graph, params, statistics = split_model(build(head, pre_norm=pre_norm))
    log_mel, lengths = energies(), np.array([16, 50, 80], np.int32)

    @jax.jit
    @jax.grad
    def gradient(params):
        classifier = nnx.merge(graph, params, statistics)
        return jnp.sum(classifier(classifier.normalize(log_mel, lengths), lengths)[:, 0])

    for path, leaf in jax.tree.leaves_with_path(gradient(params)):
        assert np.isfinite(leaf).all() and np.any(leaf), jax.tree_util.keystr(path)


def test_heads_start_as_torchs_linear_and_the_plain_mean_of_the_layers():
    head = head_config(kind="superb", layer="weighted", pool="time", projection=64)
    head = Head(head, TINY, 100, nnx.Rngs(0))
    assert not np.any(head.layer_weights), "the layers start with other weights than equal ones"
    for layer, inputs in ((head.projection, 128), (head.output, 64)):
        for values in (layer.kernel[...], layer.bias[...]):
            bound = 1 / np.sqrt(inputs)
            assert 0.9 * bound < np.abs(values).max() <= bound
            np.testing.assert_allclose(np.std(values), bound / np.sqrt(3), rtol=0.2)


@pytest.mark.parametrize("rate", ["input_dropout", "dropout", "attention_dropout", "layer_drop"])
def test_every_rate_of_the_encoder_draws_by_the_key(rate):
    classifier = build(**{rate: 0.5})
    log_mel, lengths = energies(), np.full(3, 80, np.int32)
    plain = np.asarray(logits(classifier, log_mel, lengths))
    keys = [jax.random.key(seed) for seed in (0, 1, 2, 3, 0)]
    drawn = [np.asarray(logits(classifier, log_mel, lengths, key)) for key in keys]
    np.testing.assert_array_equal(drawn[0], drawn[-1])
    assert any(np.any(x != plain) for x in drawn) and any(np.any(x != drawn[0]) for x in drawn)


def test_bfloat16_gives_float32_logits_that_are_near():
    log_mel, lengths = energies(), np.array([30, 80, 64], np.int32)
    exact, rough = (
        logits(build(SUPERB, dtype=dtype), log_mel, lengths) for dtype in ("float32", "bfloat16")
    )
    assert rough.dtype == jnp.float32
    np.testing.assert_allclose(rough, exact, atol=0.03)


def test_a_pretrained_encoder_is_put_in_and_the_head_left():
    source = pretrained.read(GOLDEN / "tiny_patch.pt")
    classifier = Classifier(source.config, head_config(), CLASSES, nnx.Rngs(0))
    _, before, _ = split_model(classifier)
    before = jax.tree.map(np.asarray, before)
    classifier.load_backbone(*source.read_weights())
    _, after, statistics = split_model(classifier)
    jax.tree.map(np.testing.assert_array_equal, before["head"], after["head"])
    wanted, wanted_statistics = source.encoder_only().read_weights()
    jax.tree.map(np.testing.assert_array_equal, wanted, after["backbone"])
    jax.tree.map(np.testing.assert_array_equal, wanted_statistics, statistics["backbone"])


@pytest.mark.parametrize("multiplies", [False, True])
def test_a_graph_has_the_products_that_suit_the_cpu(monkeypatch, multiplies):
    monkeypatch.setattr(processor, "multiplies_bfloat16", lambda: multiplies)
    graph = classifiers.classifier_graph(TINY, SSAST, CLASSES)
    _, *values = split_model(classifiers.abstract_classifier(TINY, SSAST, CLASSES))
    assert nnx.merge(graph, *values).backbone.compute.float32_factors != multiplies


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "mlp"}, "head.kind='mlp' is unknown; known: ssast, superb"),
        ({"layer": 3}, "head.layer=3 is not one of the model's 3; known: last, weighted, 0 to 2"),
    ],
)
def test_values_that_do_not_fit_are_one_line(fields, message):
    with pytest.raises(ValueError, match=message):
        classifiers.backbone_config(TINY, head_config(**fields))
