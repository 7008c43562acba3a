"""Optimisers and learning-rate schedules of pretraining and of fine-tuning."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

SCHEDULES = ("constant", "cosine", "step")


@dataclasses.dataclass(frozen=True)
class AdamWConfig:
    """The optimiser of pretraining: `optimizer` in config.pretrain()."""

    learning_rate: float
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float
    warmup_steps: int

    def __post_init__(self):
        _check_ranges(
            self,
            above_0=("learning_rate", "eps", "clip_norm"),
            not_negative=("weight_decay", "warmup_steps"),
        )


@dataclasses.dataclass(frozen=True)
class AdamConfig:
    """The optimiser of fine-tuning: `optimizer` in config.finetune()."""

    learning_rate: float
    head_rate: float
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float

    def __post_init__(self):
        _check_ranges(
            self,
            above_0=("learning_rate", "head_rate", "eps"),
            not_negative=("weight_decay", "clip_norm"),
        )


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate of fine-tuning over time: `schedule` in config.finetune()."""

    name: str
    warmup_steps: int
    factor: float
    every: int
    start: int

    def __post_init__(self):
        if self.name not in SCHEDULES:
            raise ValueError(
                f"schedule.name={self.name!r} is unknown; known: {', '.join(SCHEDULES)}"
            )
        if not 0.0 < self.factor <= 1.0:
            raise ValueError(f"schedule.factor={self.factor} must be in (0, 1]")
        for field, least in (("warmup_steps", 0), ("every", 1), ("start", 0)):
            if getattr(self, field) < least:
                raise ValueError(f"schedule.{field}={getattr(self, field)} must be {least} or more")


def check_warmup(section: str, warmup_steps: int, total_steps: int) -> None:
    """Raises ValueError, which names the configuration's section, where it leaves no other step."""
    if warmup_steps >= total_steps:
        raise ValueError(
            f"{section}.warmup_steps={warmup_steps} must be below the {total_steps} steps of the "
            f"run; give --config.{section}.warmup_steps={total_steps // 10}, or train for longer"
        )


def warmup_and_decay(config: AdamWConfig, total_steps: int) -> optax.Schedule:
    """Returns the authors' schedule: a linear rise to the peak, then a linear fall to 0.

    The first update already moves: step 0 has 1 / warmup_steps of the peak, as in fairseq. Raises
    ValueError where the warm-up leaves no step to train.
    """
    warmup_steps = config.warmup_steps
    check_warmup("optimizer", warmup_steps, total_steps)
    peak = config.learning_rate
    fall = optax.linear_schedule(peak, 0.0, total_steps - warmup_steps)
    if warmup_steps < 2:
        return fall
    rise = optax.linear_schedule(peak / warmup_steps, peak, warmup_steps - 1)
    return optax.join_schedules([rise, fall], [warmup_steps])


def by_epoch(
    config: ScheduleConfig, learning_rate: float, total_steps: int, steps_per_epoch: float
) -> optax.Schedule:
    """Returns fine-tuning's schedule: constant, a cosine to 0, or steps; first a warm-up."""

    def rate(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        value = jnp.float32(learning_rate)
        if config.name == "cosine":
            value = value * 0.5 * (1 + jnp.cos(jnp.float32(math.pi) * step / total_steps))
        elif config.name == "step":
            past = jnp.floor(step / jnp.float32(steps_per_epoch)) - config.start
            count = jnp.maximum(jnp.floor(past / config.every) + 1, 0.0)
            value = value * jnp.float32(config.factor) ** count
        if config.warmup_steps:
            value = value * jnp.minimum((step + 1) / config.warmup_steps, 1.0)
        return value

    return rate


def adamw(
    config: AdamWConfig, learning_rate: optax.ScalarOrSchedule
) -> optax.GradientTransformation:
    """Returns fairseq's Adam: clip to a global norm, then decoupled decay of every parameter."""
    return _promoting(
        optax.chain(
            optax.clip_by_global_norm(config.clip_norm),
            optax.adamw(
                learning_rate,
                b1=config.b1,
                b2=config.b2,
                eps=config.eps,
                weight_decay=config.weight_decay,
            ),
        )
    )


def adam(config: AdamConfig, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    """Returns torch's Adam, which adds the decay to the gradient; the head has its own rate.

    The head's rate is `head_rate` times the encoder's. Its parameters lie under the key "head".
    """

    def is_head(params):
        return {
            part: jax.tree.map(lambda _, of_head=part == "head": of_head, tree)
            for part, tree in params.items()
        }

    return _promoting(
        optax.chain(
            optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
            optax.add_decayed_weights(config.weight_decay),
            optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
            optax.masked(optax.scale(config.head_rate), is_head),
            optax.scale_by_learning_rate(learning_rate),
        )
    )


def _promoting(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns `inner`, usable under strict type promotion.

    optax raises a float to the power of an integer count, which strict promotion refuses.
    """

    def update(gradients, state, params=None):
        with jax.numpy_dtype_promotion("standard"):
            return inner.update(gradients, state, params)

    return optax.GradientTransformation(inner.init, update)


def _check_ranges(config: Any, above_0: Sequence[str], not_negative: Sequence[str]) -> None:
    """Raises ValueError for a field out of range, Adam's `b1` and `b2` among them."""
    # Each rule states what must hold, so that nan fails too.
    for rule, fields, holds in (
        ("be above 0", above_0, lambda value: value > 0.0),
        ("be in [0, 1)", ("b1", "b2"), lambda value: 0.0 <= value < 1.0),
        ("not be negative", not_negative, lambda value: value >= 0.0),
    ):
        for field in fields:
            if not holds(getattr(config, field)):
                raise ValueError(f"optimizer.{field}={getattr(config, field)} must {rule}")
