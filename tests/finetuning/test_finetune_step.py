"""The fine-tuning step: schedule, optimiser, loss, state, and that it learns what it is shown."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maeast_jax.finetuning import step as steps
from maeast_jax.finetuning.augment import AugmentConfig
from maeast_jax.model import HeadConfig, ModelConfig, classifier_graph

MODEL = ModelConfig(
    encoder_layers=2, decoder_layers=0, width=16, heads=2, mlp_width=32, decoder_width=16,
    layer_drop=0.0,
)  # fmt: skip
HEAD = HeadConfig(pool="time")
SAMPLES = 400 + 31 * 160


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


def make(optimizer=None, augmentation=None, accumulation=1, rate=3e-3, model=MODEL, loss=None):
    config = optimizer or steps.OptimizerConfig()
    learning_rate = steps.schedule(steps.ScheduleConfig("constant"), rate, 100, 10.0)
    adam = steps.adam(config, learning_rate)
    graph = classifier_graph(model, HEAD, 2)
    step = steps.make_train_step(
        graph, loss or steps.LossConfig(), adam, learning_rate, augmentation or AugmentConfig(),
        seed=0, accumulation_steps=accumulation,
    )  # fmt: skip
    state = steps.init_state(model, HEAD, 2, adam, seed=0, normalize=(-4.0, 4.0))
    return graph, jax.jit(step), state


def rates(config, total=100, per_epoch=10.0, steps_=range(100)):
    rate = steps.schedule(config, 1.0, total, per_epoch)
    return np.array([float(rate(jnp.int32(step))) for step in steps_])


def test_rates_fall_by_a_factor_at_epochs_as_multisteplr_does():
    found = rates(steps.ScheduleConfig("step", factor=0.5, every=2, start=5))
    np.testing.assert_allclose(
        found[[0, 49, 50, 69, 70, 89, 90]], [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125]
    )


def test_a_cosine_ends_at_0_and_a_warm_up_is_linear():
    found = rates(steps.ScheduleConfig("cosine", warmup_steps=4))
    np.testing.assert_allclose(found[:4], [0.25, 0.5, 0.75, 1.0], rtol=4e-3)
    np.testing.assert_allclose(found[50], 0.5, rtol=1e-5)
    assert found[99] < 1e-3
    assert set(rates(steps.ScheduleConfig("constant"))) == {1.0}


def test_the_optimiser_is_torchs_adam_with_decay_in_the_gradient():
    torch = pytest.importorskip("torch")
    start, gradients = (
        np.float32([1.0, -2.0, 3.0]),
        np.float32([[0.1, 0.2, -0.3], [-0.2, 0.1, 0.4]]),
    )
    theirs = torch.tensor(start, requires_grad=True)
    other = torch.optim.Adam([theirs], lr=0.1, betas=(0.95, 0.999), weight_decay=0.05)
    config = steps.OptimizerConfig(b1=0.95, b2=0.999, weight_decay=0.05, head_rate=2.0)
    ours = steps.adam(config, lambda step: jnp.float32(0.1))
    params = {"backbone": jnp.asarray(start), "head": jnp.asarray(start)}
    state = ours.init(params)
    for gradient in gradients:
        theirs.grad = torch.tensor(gradient)
        other.step()
        both = {"backbone": jnp.asarray(gradient), "head": jnp.asarray(gradient)}
        updates, state = ours.update(both, state, params)
        doubled = 2 * updates["backbone"] if gradient is gradients[0] else None
        if doubled is not None:
            np.testing.assert_allclose(updates["head"], doubled, rtol=1e-6)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["backbone"], theirs.detach().numpy(), rtol=1e-6)


@pytest.mark.parametrize("name", steps.LOSSES)
def test_losses_are_torchs(name):
    torch = pytest.importorskip("torch")
    logits = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    target = np.eye(3, dtype=np.float32)[[0, 1, 2, 0, 1]]
    ours = steps.LossConfig(name, 0.1 if name == "cross_entropy" else 0.0)(logits, target)
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
    graph, step, state = make(steps.OptimizerConfig(weight_decay=0.0))
    first = None
    for seed in range(25):
        state, metrics = step(state, batch(seed=seed))
        first = first or float(metrics["loss"][0] / metrics["loss"][1])
    held_out = batch(16, seed=1000)
    probabilities = steps.make_predict(graph, steps.LossConfig())(
        state.params, state.statistics, held_out
    )
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-5)
    assert np.mean(np.argmax(probabilities, 1) == np.argmax(held_out["target"], 1)) == 1.0
    assert float(metrics["loss"][0] / metrics["loss"][1]) < 0.3 * first


def test_accumulating_changes_nothing_but_rounding():
    plain = dataclasses.replace(MODEL, dropout=0.0, attention_dropout=0.0, input_dropout=0.0)
    results = []
    for accumulation in (1, 4):
        _, step, state = make(accumulation=accumulation, model=plain)
        results.append(step(state, batch()))
    (one, metrics), (four, metrics_of_four) = results
    np.testing.assert_allclose(metrics["loss"][0], metrics_of_four["loss"][0], rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"][0], metrics_of_four["grad_norm"][0], rtol=1e-4)
    assert int(one.step) == int(four.step) == 1


def test_augmentation_is_in_training_alone_and_a_function_of_the_step():
    augmentation = AugmentConfig(frequency_mask=60, time_mask=20, noise_and_roll=True)
    plain = dataclasses.replace(MODEL, dropout=0.0, attention_dropout=0.0, input_dropout=0.0)
    _, step, state = make(augmentation=augmentation, model=plain)
    _, without, _ = make(model=plain)
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
    ("make_config", "message"),
    [
        (lambda: steps.LossConfig("hinge"), "loss.name='hinge' is unknown; known: cross_entropy"),
        (lambda: steps.LossConfig(label_smoothing=1.0), r"label_smoothing=1.0 must be in \[0, 1\)"),
        (lambda: steps.OptimizerConfig(learning_rate=0.0), "learning_rate=0.0 must be above 0"),
        (lambda: steps.OptimizerConfig(b2=1.0), r"optimizer.b2=1.0 must be in \[0, 1\)"),
        (lambda: steps.ScheduleConfig("steps"), "schedule.name='steps' is unknown; known: const"),
        (lambda: steps.ScheduleConfig(factor=2.0), r"schedule.factor=2.0 must be in \(0, 1\]"),
        (lambda: steps.ScheduleConfig(every=0), "schedule.every=0 must be 1 or more"),
    ],
)
def test_values_out_of_range_are_one_line(make_config, message):
    with pytest.raises(ValueError, match=message):
        make_config()
