"""AdamW and the authors' schedule."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import optax


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The paper's optimiser (fairseq's Adam with decoupled decay on every parameter)."""

    learning_rate: float = 1e-4
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-6
    weight_decay: float = 0.01
    clip_norm: float = 10.0
    warmup_steps: int = 32_000

    def __post_init__(self):
        check_ranges(
            self,
            above_0=("learning_rate", "eps", "clip_norm"),
            not_negative=("weight_decay", "warmup_steps"),
        )


def check_ranges(config: Any, above_0: Sequence[str], not_negative: Sequence[str]) -> None:
    """Raises ValueError for a field out of range, of these and of Adam's `b1` and `b2`."""
    # Written as what must hold, so that nan fails too.
    for rule, fields, holds in (
        ("be above 0", above_0, lambda value: value > 0.0),
        ("be in [0, 1)", ("b1", "b2"), lambda value: 0.0 <= value < 1.0),
        ("not be negative", not_negative, lambda value: value >= 0.0),
    ):
        for field in fields:
            if not holds(getattr(config, field)):
                raise ValueError(f"optimizer.{field}={getattr(config, field)} must {rule}")


def schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Linear rise over `warmup_steps` updates, then linear fall to 0 at `total_steps`.

    The first update already moves (step 0 has 1 / warmup_steps of the peak), as fairseq's does.
    Raises ValueError where the warm-up leaves nothing to train.
    """
    warmup_steps = config.warmup_steps
    if warmup_steps >= total_steps:
        raise ValueError(
            f"optimizer.warmup_steps={warmup_steps} must be below total_steps={total_steps}; give "
            f"--config.optimizer.warmup_steps={total_steps // 10} or more steps"
        )
    peak = config.learning_rate
    fall = optax.linear_schedule(peak, 0.0, total_steps - warmup_steps)
    if warmup_steps < 2:
        return fall
    rise = optax.linear_schedule(peak / warmup_steps, peak, warmup_steps - 1)
    return optax.join_schedules([rise, fall], [warmup_steps])


def adamw(
    config: OptimizerConfig, learning_rate: optax.ScalarOrSchedule
) -> optax.GradientTransformation:
    """Clip to a global norm, then Adam with decoupled decay of every parameter."""
    inner = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
        ),
    )

    return promoting(inner)


def promoting(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` where types are promoted strictly.

    optax raises a float to the power of an integer count, which strict promotion refuses.
    """

    def update(gradients, state, params=None):
        with jax.numpy_dtype_promotion("standard"):
            return inner.update(gradients, state, params)

    return optax.GradientTransformation(inner.init, update)
