"""The classifier against numpy, against embeddings, and against itself in other batches."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import head_config, model_config

from maeast_jax import fbank
from maeast_jax.inference import Embedder, pretrained
from maeast_jax.model import classifier as classifiers
from maeast_jax.model.classifier import Classifier, Head
from maeast_jax.model.mae_ast import split_model

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = model_config(
    encoder_layers=3, decoder_layers=0, width=16, heads=2, mlp_width=24, decoder_width=16,
    input_dropout=0.0, dropout=0.0, attention_dropout=0.0, layer_drop=0.0,
)  # fmt: skip
CLASSES = 5
HEADS = [
    head_config(pool="mean"),
    head_config(layer="weighted", pool="time"),
    head_config(kind="superb", pool="mean", projection=7),
    head_config(kind="superb", layer="weighted", pool="time", projection=7),
]


@functools.cache
def build(head=HEADS[0], **changes):
    """A classifier that no test changes."""
    config = dataclasses.replace(TINY, **changes)
    classifier = nnx.jit(lambda: Classifier(config, head, CLASSES, nnx.Rngs(0)))()
    classifier.set_input_statistics(-5.0, 3.0)
    if classifier.head.layer_weights is not None:
        classifier.head.layer_weights[...] = jnp.array([0.5, -1.0, 0.0])
    return classifier


def energies(clips=3, frames=80):
    """Log energies with something in the padding."""
    return np.random.default_rng(1).normal(-5, 3, (clips, frames, 128)).astype(np.float32)


@nnx.jit
def logits(classifier, log_mel, lengths, key=None):
    return classifier(classifier.normalize(log_mel, lengths), lengths, key)


def hidden_states(classifier, log_mel, lengths):
    """[L, b, C, R, D] of full clips, from the backbone's own `encode_fbank`."""
    encode = nnx.jit(lambda model: model.encode_fbank(log_mel, lengths).hidden_states)
    states = np.asarray(encode(classifier.backbone))
    layers, clips, _, width = states.shape
    return states.reshape(layers, clips, -1, classifier.head.bands, width)


@pytest.mark.parametrize(("head", "tokens"), [(HEADS[0], "frame"), (HEADS[3], "patch")])
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


def test_frames_past_the_last_whole_patch_are_dropped():
    classifier, log_mel = build(), energies(2)
    log_mel[1, :32] = log_mel[0, :32]
    both = logits(classifier, log_mel, np.array([32, 47], np.int32))
    np.testing.assert_array_equal(both[0], both[1])
    other = logits(classifier, log_mel, np.array([48, 47], np.int32))
    assert np.abs(np.asarray(other[0] - other[1])).max() > 1e-3


@pytest.mark.parametrize("pool", ["mean", "time"])
def test_what_is_pooled_is_the_embedding(pool):
    """Both layers of a superb head as identities; clips of several lengths in one batch."""
    samples = [400, 5_359, 10_480]
    bands = 8 if pool == "time" else 1
    head = head_config(kind="superb", pool=pool, projection=16 * bands)
    classifier = Classifier(TINY, head, 16 * bands, nnx.Rngs(0))
    for layer in (classifier.head.projection, classifier.head.output):
        layer.kernel[...] = jnp.eye(16 * bands)
        layer.bias[...] = jnp.zeros(16 * bands)
    generator = np.random.default_rng(0)
    waves = [generator.normal(0, 0.1, size).astype(np.float32) for size in samples]
    padded = np.stack([np.pad(wave, (0, max(samples) - len(wave))) for wave in waves])
    lengths = np.array([fbank.num_frames(size) for size in samples], np.int32)
    found = logits(classifier, fbank.fbank(padded), lengths)
    wanted = np.stack(list(Embedder(classifier.backbone, pool=pool)(waves)))
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_heads_are_what_numpy_computes(head):
    """In the recipes' own order: every step is weighed and projected, then averaged."""
    classifier = build(head)
    log_mel, lengths = energies(), np.full(3, 80, np.int32)
    states = hidden_states(classifier, log_mel, lengths)
    if head.layer == "weighted":
        weights = np.exp([0.5, -1.0, 0.0]) / np.exp([0.5, -1.0, 0.0]).sum()
        states = np.tensordot(weights, states, axes=1)
    else:
        states = states[-1]
    clips, steps, _, width = states.shape
    side_by_side = head.pool == "time"
    tokens = states.reshape(clips, steps, -1) if side_by_side else states.reshape(clips, -1, width)
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


def test_weighted_layers_start_as_the_plain_mean():
    states = jax.random.normal(jax.random.key(0), (3, 2, 40, 16))
    padding = jnp.zeros((2, 40), bool)
    weighted, plain = (
        Head(head_config(kind="superb", layer=layer), TINY, CLASSES, nnx.Rngs(0))
        for layer in ("weighted", "last")
    )
    mean = jnp.mean(states, axis=0, keepdims=True)
    np.testing.assert_allclose(weighted(states, padding), plain(mean, padding), atol=1e-6)


def test_a_numbered_layer_is_the_encoder_cut_off_above_it():
    log_mel, lengths = energies(), np.full(3, 80, np.int32)
    whole = build(HEADS[0])
    _, params, statistics = split_model(whole.backbone)

    def found(layer):
        classifier = nnx.clone(build(head_config(layer=layer, pool="mean")))
        classifier.load_backbone(params, statistics)
        return classifier, np.asarray(logits(classifier, log_mel, lengths))

    first, first_logits = found(0)
    assert first.backbone.config.encoder_layers == 1
    last = logits(whole, log_mel, lengths)
    np.testing.assert_array_equal(found("2")[1], last)
    weighted = nnx.clone(build(head_config(layer="weighted", pool="mean")))
    weighted.load_backbone(params, statistics)
    weighted.head.layer_weights[...] = jnp.array([100.0, 0.0, 0.0])
    np.testing.assert_allclose(logits(weighted, log_mel, lengths), first_logits, atol=1e-5)


@pytest.mark.parametrize(("head", "pre_norm"), [(HEADS[0], True), (HEADS[3], False)])
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


def test_parameters_are_the_encoders_and_the_heads():
    def count(head, part):
        _, params, _ = split_model(classifiers.abstract_classifier(TINY, head, CLASSES))
        assert set(params) == {"backbone", "head"}
        return sum(leaf.size for leaf in jax.tree.leaves(params[part]))

    layer = 4 * 16 * 16 + 4 * 16 + 2 * 16 * 24 + 24 + 16 + 4 * 16
    assert count(HEADS[0], "backbone") == 256 * 16 + 16 + 3 * layer + 2 * 16
    assert count(HEADS[0], "head") == 2 * 16 + 16 * 5 + 5
    assert count(HEADS[1], "head") == 3 + 2 * 128 + 128 * 5 + 5
    assert count(HEADS[2], "head") == 16 * 7 + 7 + 7 * 5 + 5
    assert count(HEADS[3], "head") == 3 + 128 * 7 + 7 + 7 * 5 + 5


def test_heads_start_as_torchs_linear():
    head = Head(head_config(kind="superb", pool="time", projection=64), TINY, 100, nnx.Rngs(0))
    for layer, inputs in ((head.projection, 128), (head.output, 64)):
        for values in (layer.kernel[...], layer.bias[...]):
            bound = 1 / np.sqrt(inputs)
            assert 0.9 * bound < np.abs(values).max() <= bound
            np.testing.assert_allclose(np.std(values), bound / np.sqrt(3), rtol=0.2)


def test_a_data_sets_statistics_are_those_of_the_recipe():
    classifier, log_mel = nnx.clone(build()), energies()
    lengths = np.array([80, 80, 48], np.int32)
    classifier.set_input_statistics(-4.2677393, 4.5689974)
    found = np.asarray(classifier.normalize(log_mel, lengths))
    wanted = (log_mel + 4.2677393) / (2 * 4.5689974)
    np.testing.assert_allclose(found[:2], wanted[:2], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[2, 48:], 4.2677393 / (2 * 4.5689974), rtol=1e-6)


def test_training_draws_by_its_key_and_moves_no_statistics():
    classifier = build(dropout=0.1, attention_dropout=0.1, input_dropout=0.1, layer_drop=0.3)
    log_mel, lengths = energies(), np.full(3, 80, np.int32)
    before = jax.tree.map(np.asarray, split_model(classifier)[2])

    def run(seed):
        key = None if seed is None else jax.random.key(seed)
        return np.asarray(logits(classifier, log_mel, lengths, key))

    np.testing.assert_array_equal(run(None), run(None))
    np.testing.assert_array_equal(run(2), run(2))
    assert np.any(run(2) != run(3)) and np.any(run(2) != run(None))
    jax.tree.map(np.testing.assert_array_equal, before, split_model(classifier)[2])


@pytest.mark.parametrize("rate", ["input_dropout", "dropout", "attention_dropout", "layer_drop"])
def test_every_rate_of_the_encoder_has_its_part(rate):
    classifier = build(**{rate: 0.5})
    log_mel, lengths = energies(), np.full(3, 80, np.int32)
    drawn = [logits(classifier, log_mel, lengths, jax.random.key(seed)) for seed in range(4)]
    assert any(np.any(np.asarray(x) != np.asarray(drawn[0])) for x in drawn[1:])


def test_bfloat16_gives_float32_logits_that_are_near():
    log_mel, lengths = energies(), np.array([30, 80, 64], np.int32)
    exact, rough = (
        logits(build(HEADS[3], dtype=dtype), log_mel, lengths) for dtype in ("float32", "bfloat16")
    )
    assert rough.dtype == jnp.float32
    np.testing.assert_allclose(rough, exact, atol=0.03)
    assert np.any(np.asarray(rough) != np.asarray(exact))


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
    log_mel, lengths = energies(frames=64), np.full(3, 64, np.int32)
    encode = nnx.jit(lambda model: model.encode_fbank(log_mel, lengths).hidden_states)
    expected, found = encode(source.model()), encode(classifier.backbone)
    np.testing.assert_array_equal(found, expected)


def test_another_architecture_is_one_line():
    source = pretrained.read(GOLDEN / "tiny_patch.pt")
    for changes, message in (
        ({"encoder_layers": 2}, "encoder has 3 layers, the configuration 2"),
        ({"mlp_width": 32}, r"encoder.layers.mlp.down.kernel is \[3, .*, 64\], the config"),
    ):
        config = dataclasses.replace(source.config, **changes)
        classifier = classifiers.abstract_classifier(config, head_config(), CLASSES)
        with pytest.raises(ValueError, match=message) as error:
            classifier.load_backbone(*source.read_weights())
        assert "\n" not in str(error.value)


def test_the_graph_of_a_classifier_needs_no_values():
    classifier = build(HEADS[3])
    _, params, statistics = split_model(classifier)
    graph = classifiers.classifier_graph(TINY, HEADS[3], CLASSES)
    again = nnx.merge(graph, params, statistics)
    inputs = energies(), np.full(3, 80, np.int32)
    np.testing.assert_array_equal(logits(again, *inputs), logits(classifier, *inputs))


def test_the_backbone_of_a_graph_has_the_factors_that_it_is_given():
    for given in (False, True):
        graph = classifiers.classifier_graph(TINY, HEADS[0], CLASSES, float32_factors=given)
        _, *values = split_model(classifiers.abstract_classifier(TINY, HEADS[0], CLASSES))
        assert nnx.merge(graph, *values).backbone.compute.float32_factors == given


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "mlp"}, "head.kind='mlp' is unknown; known: ssast, superb"),
        ({"pool": "max"}, "head.pool='max' is unknown; known: mean, time"),
        (
            {"layer": "first"},
            "head.layer='first' is not one of .*known: last, weighted, 0 to 2",
        ),
        ({"layer": 1.5}, "head.layer=1.5 is not one of"),
        ({"projection": 0}, "head.projection=0 must be at least 1"),
        (
            {"layer": 3},
            "head.layer=3 is not one of the model's 3; known: .*0 to 2, -3 to -1",
        ),
        ({"layer": "-4"}, "head.layer='-4' is not one of"),
    ],
)
def test_values_that_do_not_fit_are_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        classifiers.backbone_config(TINY, head_config(**fields))
    assert "\n" not in str(error.value)


def test_no_classes_are_refused():
    with pytest.raises(ValueError, match="num_classes=0 must be at least 1"):
        Classifier(TINY, head_config(), 0, nnx.Rngs(0))
