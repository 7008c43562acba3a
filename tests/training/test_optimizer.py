import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from maeast_jax import config as configuration
from maeast_jax.training import optimizer as optimizers
from maeast_jax.training.optimizer import (
    AdamConfig,
    AdamWConfig,
    ScheduleConfig,
    adamw,
    warmup_and_decay,
)


def adamw_config(**changes):
    return AdamWConfig(**tiny.section("optimizer", **changes))


def adam_config(**changes):
    return AdamConfig(**tiny.section("optimizer", configuration.finetune, **changes))


def schedule_config(**changes):
    return ScheduleConfig(**tiny.section("schedule", configuration.finetune, **changes))


def test_schedule_rises_from_the_first_update_and_ends_at_zero():
    rate = warmup_and_decay(adamw_config(learning_rate=2.0, warmup_steps=4), 12)
    steps = [float(rate(step)) for step in range(13)]
    np.testing.assert_allclose(steps[:5], [0.5, 1.0, 1.5, 2.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose(steps[4:], np.linspace(2.0, 0.0, 9), atol=1e-6)


@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_schedule_without_warmup_starts_at_the_peak(warmup_steps):
    rate = warmup_and_decay(adamw_config(learning_rate=2.0, warmup_steps=warmup_steps), 12)
    np.testing.assert_allclose(rate(0), 2.0)


def test_a_warmup_that_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match="warmup_steps=100 must be below the 100 steps of the run"):
        warmup_and_decay(adamw_config(warmup_steps=100), 100)


@pytest.mark.parametrize(
    ("make_config", "message"),
    [
        (lambda: adamw_config(learning_rate=0.0), "optimizer.learning_rate=0.0 must be above 0"),
        (lambda: adamw_config(learning_rate=float("nan")), "optimizer.learning_rate=nan must be"),
        (lambda: adamw_config(b1=1.0), r"optimizer.b1=1.0 must be in \[0, 1\)"),
        (lambda: adamw_config(warmup_steps=-1), "optimizer.warmup_steps=-1 must not be negative"),
        (lambda: adam_config(head_rate=0.0), "optimizer.head_rate=0.0 must be above 0"),
        (lambda: schedule_config(name="steps"), "schedule.name='steps' is unknown; known: const"),
        (lambda: schedule_config(factor=2.0), r"schedule.factor=2.0 must be in \(0, 1\]"),
        (lambda: schedule_config(every=0), "schedule.every=0 must be 1 or more"),
    ],
)
def test_values_out_of_range_are_one_line(make_config, message):
    with pytest.raises(ValueError, match=message):
        make_config()


def test_adamw_is_torchs_with_clipping():
    torch = pytest.importorskip("torch")
    config = adamw_config(learning_rate=0.01, clip_norm=1.0, warmup_steps=0)
    start = np.array([1.0, -2.0, 3.0], np.float32)
    gradients = [np.array(g, np.float32) for g in ([3.0, 4.0, 0.0], [0.1, 0.0, -0.1])]
    theirs = torch.nn.Parameter(torch.tensor(start))
    torch_adamw = torch.optim.AdamW([theirs], 0.01, (0.9, 0.98), 1e-6, 0.01)
    ours, optimizer = jnp.asarray(start), adamw(config, 0.01)
    state = optimizer.init(ours)
    for gradient in gradients:
        theirs.grad = torch.tensor(gradient)
        torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        torch_adamw.step()
        updates, state = optimizer.update(jnp.asarray(gradient), state, ours)
        ours = optax.apply_updates(ours, updates)
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-6)


def rates(config, total=100, per_epoch=10.0, steps_=range(100)):
    rate = optimizers.by_epoch(config, 1.0, total, per_epoch)
    return np.array([float(rate(jnp.int32(step))) for step in steps_])


def test_rates_fall_by_a_factor_at_epochs_as_multisteplr_does():
    found = rates(schedule_config(name="step", factor=0.5, every=2, start=5))
    np.testing.assert_allclose(
        found[[0, 49, 50, 69, 70, 89, 90]], [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125]
    )


def test_a_cosine_ends_at_0_and_a_warm_up_is_linear():
    found = rates(schedule_config(name="cosine", warmup_steps=4))
    np.testing.assert_allclose(found[:4], [0.25, 0.5, 0.75, 1.0], rtol=4e-3)
    np.testing.assert_allclose(found[50], 0.5, rtol=1e-5)
    assert found[99] < 1e-3
    assert set(rates(schedule_config(name="constant"))) == {1.0}


@pytest.mark.slow
def test_the_optimiser_is_torchs_adam_with_decay_in_the_gradient():
    torch = pytest.importorskip("torch")
    start, gradients = (
        np.float32([1.0, -2.0, 3.0]),
        np.float32([[0.1, 0.2, -0.3], [-0.2, 0.1, 0.4]]),
    )
    theirs = torch.tensor(start, requires_grad=True)
    other = torch.optim.Adam([theirs], lr=0.1, betas=(0.95, 0.999), weight_decay=0.05)
    config = adam_config(b1=0.95, b2=0.999, weight_decay=0.05, head_rate=2.0)
    ours = optimizers.adam(config, lambda step: jnp.float32(0.1))
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
