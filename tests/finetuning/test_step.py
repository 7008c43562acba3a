"""The fine-tuning step: loss, state, and that it learns what it is shown."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from maeast_jax import config as configuration
from maeast_jax.finetuning import step as steps
from maeast_jax.finetuning.augment import AugmentConfig
from maeast_jax.model import HeadConfig, classifier_graph
from maeast_jax.training import optimizer

MODEL = tiny.model_config(
    encoder_layers=1,
    decoder_layers=0,
    width=16,
    heads=2,
    mlp_width=32,
    decoder_width=16,
    layer_drop=0.0,
)
PLAIN = dataclasses.replace(MODEL, dropout=0.0, attention_dropout=0.0, input_dropout=0.0)
HEAD = HeadConfig(**tiny.section("head", configuration.finetune, pool="time"))
SAMPLES = 400 + 31 * 160


def constant(step):
    return jnp.float32(3e-3)


def batch(count=8, seed=0):
    """Two classes: a low and a high tone in noise."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    time = np.arange(SAMPLES) / 16_000
    tones = np.sin(2 * np.pi * np.array([300.0, 3000.0])[labels][:, None] * time)
    audio = 8000 * tones + random.normal(0, 300, (count, SAMPLES))
    return {
        "audio": audio.astype(np.int16),
        "num_samples": np.full(count, SAMPLES, np.int32),
        "target": np.eye(2, dtype=np.float32)[labels],
    }


def loss_config(**changes):
    return steps.LossConfig(**tiny.section("loss", configuration.finetune, **changes))


def make(accumulation=1, model=MODEL, weight_decay=5e-7, **augmentation):
    settings = tiny.section("optimizer", configuration.finetune, weight_decay=weight_decay)
    adam = optimizer.adam(optimizer.AdamConfig(**settings), constant)
    graph = classifier_graph(model, HEAD, 2)
    augment = AugmentConfig(**tiny.section("augment", configuration.finetune, **augmentation))
    step = steps.make_train_step(
        graph, loss_config(), adam, constant, augment, seed=0, accumulation_steps=accumulation
    )
    state = steps.init_state(model, HEAD, 2, adam, seed=0, normalize=(-4.0, 4.0))
    return graph, jax.jit(step), state


@pytest.mark.slow
@pytest.mark.parametrize("name", steps.LOSSES)
def test_losses_are_torchs(name):
    torch = pytest.importorskip("torch")
    logits = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    target = np.eye(3, dtype=np.float32)[[0, 1, 2, 0, 1]]
    ours = loss_config(name=name, label_smoothing=0.1 if name == "cross_entropy" else 0.0)(
        logits, target
    )
    if name == "cross_entropy":
        theirs = torch.nn.functional.cross_entropy(
            torch.tensor(logits), torch.tensor(target), reduction="none", label_smoothing=0.1
        )
    else:
        theirs = torch.nn.functional.binary_cross_entropy_with_logits(
            torch.tensor(logits), torch.tensor(target), reduction="none"
        ).mean(1)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_it_learns_to_tell_two_tones_apart():
    graph, step, state = make(weight_decay=0.0)
    first = None
    for seed in range(25):
        state, metrics = step(state, batch(seed=seed))
        first = first or float(metrics["loss"][0] / metrics["loss"][1])
    held_out = batch(16, seed=1000)
    probabilities = steps.make_predict(graph, loss_config())(
        state.params, state.statistics, held_out
    )
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-5)
    assert np.mean(np.argmax(probabilities, 1) == np.argmax(held_out["target"], 1)) == 1.0
    assert float(metrics["loss"][0] / metrics["loss"][1]) < 0.3 * first


def test_accumulating_changes_nothing_but_rounding():
    results = []
    for accumulation in (1, 4):
        _, step, state = make(accumulation=accumulation, model=PLAIN)
        results.append(step(state, batch()))
    (one, metrics), (four, metrics_of_four) = results
    np.testing.assert_allclose(metrics["loss"][0], metrics_of_four["loss"][0], rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"][0], metrics_of_four["grad_norm"][0], rtol=1e-4)
    assert int(one.step) == int(four.step) == 1


def test_augmentation_is_in_training_alone_and_a_function_of_the_step():
    _, step, state = make(model=PLAIN, frequency_mask=60, time_mask=20, noise_and_roll=True)
    _, without, _ = make(model=PLAIN)
    losses = [float(s(state, batch())[1]["loss"][0]) for s in (step, step, without)]
    assert losses[0] == losses[1] != losses[2]
    later = dataclasses.replace(state, step=state.step + 1)
    assert float(step(later, batch())[1]["loss"][0]) != losses[0]


def values(tree):
    return np.asarray(jax.tree.leaves(tree)[0])


def test_the_best_is_kept_and_the_average_is_the_mean_of_epochs():
    _, _, state = make()
    epochs = [jax.tree.map(lambda x, k=k: x + np.float32(k), state.params) for k in (1.0, 4.0, 7.0)]

    def after(selection):
        now = state
        for params, value in zip(epochs, (0.2, 0.5, 0.4), strict=True):
            now = steps.choose(
                dataclasses.replace(now, params=params), selection, np.float32(value)
            )
        return now

    np.testing.assert_array_equal(values(after("best").chosen), values(epochs[1]))
    assert after("best").chosen_value == np.float32(0.5)
    np.testing.assert_array_equal(values(after("last").chosen), values(epochs[2]))
    np.testing.assert_allclose(values(after("average").chosen), values(epochs[1]), rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "hinge"}, "loss.name='hinge' is unknown; known: cross_entropy"),
        ({"label_smoothing": 1.0}, r"label_smoothing=1.0 must be in \[0, 1\)"),
    ],
)
def test_losses_out_of_range_are_one_line(changes, message):
    with pytest.raises(ValueError, match=message):
        loss_config(**changes)
