"""Fine-tuning: state, optimiser, training step and prediction; pure functions, no I/O.

Batches: {audio int16 [b, S], num_samples int32 [b], target float32 [b, C]}.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from maeast_jax import fbank
from maeast_jax.finetuning import augment
from maeast_jax.finetuning.augment import AugmentConfig
from maeast_jax.model import Classifier, HeadConfig, ModelConfig, split_model, stream_key
from maeast_jax.training.optimizer import check_ranges, promoting
from maeast_jax.training.steps import Metrics, accumulate

Batch = dict[str, jax.Array]
LOSSES = ("cross_entropy", "binary_cross_entropy")
SCHEDULES = ("constant", "cosine", "step")
SELECTIONS = ("best", "last", "average")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What is minimised; binary cross-entropy is the mean over classes, as torch's."""

    name: str = "cross_entropy"
    label_smoothing: float = 0.0

    def __post_init__(self):
        if self.name not in LOSSES:
            raise ValueError(f"loss.name={self.name!r} is unknown; known: {', '.join(LOSSES)}")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"loss.label_smoothing={self.label_smoothing} must be in [0, 1)")

    def __call__(self, logits_BxC: jax.Array, target_BxC: jax.Array) -> jax.Array:
        """float32 [b]."""
        num_classes = logits_BxC.shape[1]
        smoothing = jnp.float32(self.label_smoothing)
        if self.name == "cross_entropy":
            target_BxC = target_BxC * (1 - smoothing) + smoothing / num_classes
            return optax.softmax_cross_entropy(logits_BxC, target_BxC)
        target_BxC = target_BxC * (1 - smoothing) + smoothing / 2
        return jnp.mean(optax.sigmoid_binary_cross_entropy(logits_BxC, target_BxC), axis=1)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Adam as torch has it, its decay added to the gradient; both recipes' (SSAST, SUPERB)."""

    learning_rate: float = 1e-4
    head_rate: float = 1.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 5e-7
    clip_norm: float = 0.0

    def __post_init__(self):
        check_ranges(
            self,
            above_0=("learning_rate", "head_rate", "eps"),
            not_negative=("weight_decay", "clip_norm"),
        )


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """The rate over time: constant, a cosine to 0, or steps by epoch; after a linear warm-up."""

    name: str = "cosine"
    warmup_steps: int = 0
    factor: float = 0.85
    every: int = 1
    start: int = 5

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


def schedule(
    config: ScheduleConfig, learning_rate: float, total_steps: int, steps_per_epoch: float
) -> optax.Schedule:
    """The learning rate of a step, a function of its number alone."""

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


def adam(config: OptimizerConfig, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    """Clip, decay, Adam; the head's updates times `head_rate`."""

    def is_head(params):
        return {part: jax.tree.map(lambda _, of_head=part == "head": of_head, tree)
                for part, tree in params.items()}  # fmt: skip

    inner = optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.masked(optax.scale(config.head_rate), is_head),
        optax.scale_by_learning_rate(learning_rate),
    )

    return promoting(inner)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FinetuneState:
    """All that a checkpoint holds.

    `chosen` are the parameters that will be tested: the best so far, or the mean of some epochs';
    `chosen_value` is the best's metric on validation, `chosen_count` how many the mean is of.
    """

    step: jax.Array
    params: Any
    statistics: Any
    opt_state: Any
    chosen: Any
    chosen_value: jax.Array
    chosen_count: jax.Array


def init_state(
    model: ModelConfig,
    head: HeadConfig,
    num_classes: int,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    weights: tuple[Any, Any] | None = None,
    normalize: tuple[float, float] | None = None,
) -> FinetuneState:
    """Initial values, a function of `seed`, under a pretrained encoder's `weights` if given.

    normalize: (mean, deviation) of the set's log energies; None keeps the encoder's statistics.
    """
    rngs = nnx.Rngs(params=stream_key(seed, jnp.zeros((), jnp.int32), "params"))
    classifier = Classifier(model, head, num_classes, rngs)
    if weights is not None:
        classifier.load_backbone(*weights)
    if normalize is not None:
        classifier.set_input_statistics(*normalize)
    _, params, statistics = split_model(classifier)
    return FinetuneState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        statistics=statistics,
        opt_state=optimizer.init(params),
        chosen=jax.tree.map(jnp.copy, params),
        chosen_value=jnp.full((), -jnp.inf, jnp.float32),
        chosen_count=jnp.zeros((), jnp.int32),
    )


def choose(state: FinetuneState, selection: str, value: jax.Array) -> FinetuneState:
    """The state after an epoch whose parameters reached `value` on validation.

    best: kept where it is higher than before. average: the running mean over the calls. last: kept.
    """
    count = state.chosen_count + 1
    if selection == "best":
        is_better = value > state.chosen_value
        chosen = jax.tree.map(
            lambda new, old: jnp.where(is_better, new, old), state.params, state.chosen
        )
        value = jnp.maximum(value, state.chosen_value)
    elif selection == "average":
        chosen = jax.tree.map(
            lambda new, old: old + (new - old) / count.astype(jnp.float32),
            state.params,
            state.chosen,
        )
    else:
        chosen = state.params
    return dataclasses.replace(state, chosen=chosen, chosen_value=value, chosen_count=count)


def make_train_step(
    graph: nnx.GraphDef,
    loss: LossConfig,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    augmentation: AugmentConfig,
    *,
    seed: int,
    accumulation_steps: int = 1,
) -> Callable[[FinetuneState, Batch], tuple[FinetuneState, Metrics]]:
    """`(state, batch) -> (state, metrics)`; every draw is a function of (seed, step, name)."""

    def train_step(state: FinetuneState, batch: Batch) -> tuple[FinetuneState, Metrics]:
        def key(name: str) -> jax.Array:
            return stream_key(seed, state.step, name)

        audio_BxS, target_BxC = augment.mixup(
            key("mixup"), batch["audio"], batch["target"], batch["num_samples"], augmentation
        )
        num_frames_B = fbank.frame_count(batch["num_samples"])
        fbank_BxTxF = augment.spec_augment(
            key("spec_augment"), fbank.fbank(audio_BxS), num_frames_B, augmentation
        )
        classifier = nnx.merge(graph, state.params, state.statistics)
        normalized_BxTxF = augment.noise_and_roll(
            key("noise_and_roll"),
            classifier.normalize(fbank_BxTxF, num_frames_B),
            num_frames_B,
            augmentation,
        )

        def gradient(examples, dropout_key):
            normalized_BxTxF, num_frames_B, target_BxC = examples

            def mean_loss(params):
                logits_BxC = nnx.merge(graph, params, state.statistics)(
                    normalized_BxTxF, num_frames_B, dropout_key
                )
                loss_B = loss(logits_BxC, target_BxC)
                return jnp.mean(loss_B), jnp.sum(loss_B)

            gradients, total = jax.grad(mean_loss, has_aux=True)(state.params)
            return gradients, {"loss": total}

        examples = (normalized_BxTxF, num_frames_B, target_BxC)
        gradients, sums = accumulate(gradient, examples, key("dropout"), accumulation_steps)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        one = jnp.ones((), jnp.float32)
        metrics = {
            "loss": (sums["loss"], one * target_BxC.shape[0]),
            "grad_norm": (optax.tree.norm(gradients), one),
            "learning_rate": (learning_rate(state.step), one),
        }
        return dataclasses.replace(
            state,
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
        ), metrics

    return train_step


def make_predict(graph: nnx.GraphDef, loss: LossConfig) -> Callable[[Any, Any, Batch], jax.Array]:
    """`(params, statistics, batch) -> probabilities` float32 [b, C]; no target is looked at."""
    squash = jax.nn.softmax if loss.name == "cross_entropy" else jax.nn.sigmoid

    def predict(params: Any, statistics: Any, batch: Batch) -> jax.Array:
        classifier = nnx.merge(graph, params, statistics)
        num_frames_B = fbank.frame_count(batch["num_samples"])
        normalized_BxTxF = classifier.normalize(fbank.fbank(batch["audio"]), num_frames_B)
        return squash(classifier(normalized_BxTxF, num_frames_B))

    return predict
