import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maeast_jax.training.optimizer import OptimizerConfig, adamw, schedule


def test_schedule_rises_from_the_first_update_and_ends_at_zero():
    rate = schedule(OptimizerConfig(learning_rate=2.0, warmup_steps=4), 12)
    steps = [float(rate(step)) for step in range(13)]
    np.testing.assert_allclose(steps[:5], [0.5, 1.0, 1.5, 2.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose(steps[4:], np.linspace(2.0, 0.0, 9), atol=1e-6)


@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_schedule_without_warmup_starts_at_the_peak(warmup_steps):
    rate = schedule(OptimizerConfig(learning_rate=2.0, warmup_steps=warmup_steps), 12)
    np.testing.assert_allclose(rate(0), 2.0)


def test_a_warmup_that_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match="warmup_steps=100 must be below total_steps=100"):
        schedule(OptimizerConfig(warmup_steps=100), 100)


@pytest.mark.parametrize(
    "fields",
    [
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"b1": 1.0},
        {"weight_decay": -1.0},
        {"clip_norm": 0.0},
        {"warmup_steps": -1},
    ],
)
def test_values_out_of_range_are_refused(fields):
    name, value = next(iter(fields.items()))
    with pytest.raises(ValueError, match=f"optimizer.{name}={value} must"):
        OptimizerConfig(**fields)


def test_adamw_is_torchs_with_clipping():
    torch = pytest.importorskip("torch")
    config = OptimizerConfig(learning_rate=0.01, clip_norm=1.0, warmup_steps=0)
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
