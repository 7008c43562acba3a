"""Fine-tuning: state, loss, training step and prediction; pure functions, no I/O.

A batch is {audio int16 [b, S], num_samples int32 [b], target float32 [b, C]}. Names of shapes: B
clips, S samples, T frames, F bands, C classes.
"""

import dataclasses
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
from maeast_jax.training import DeviceBatch, Metrics, steps

LOSSES = ("cross_entropy", "binary_cross_entropy")
SELECTIONS = ("best", "last", "average")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The loss that is minimised: `loss` in config.finetune().

    Binary cross-entropy is the mean over classes, as torch's is.
    """

    name: str
    label_smoothing: float

    def __post_init__(self):
        if self.name not in LOSSES:
            raise ValueError(f"loss.name={self.name!r} is unknown; known: {', '.join(LOSSES)}")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"loss.label_smoothing={self.label_smoothing} must be in [0, 1)")

    def __call__(self, logits_BxC: jax.Array, target_BxC: jax.Array) -> jax.Array:
        """Returns float32 [b]."""
        num_classes = logits_BxC.shape[1]
        smoothing = jnp.float32(self.label_smoothing)
        if self.name == "cross_entropy":
            target_BxC = target_BxC * (1 - smoothing) + smoothing / num_classes
            return optax.softmax_cross_entropy(logits_BxC, target_BxC)
        target_BxC = target_BxC * (1 - smoothing) + smoothing / 2
        return jnp.mean(optax.sigmoid_binary_cross_entropy(logits_BxC, target_BxC), axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FinetuneState:
    """All that a checkpoint holds.

    `chosen` are the parameters that will be tested: the best so far, or the mean over some
    evaluations. `chosen_value` is the metric of the best on validation, `chosen_count` the number
    of evaluations in the mean.
    """

    step: jax.Array
    params: Any
    statistics: Any
    opt_state: Any
    chosen: Any
    chosen_value: jax.Array
    chosen_count: jax.Array

    def parts(self) -> dict[str, Any]:
        """Returns a checkpoint's parts; `weights` are tested, and have pretraining's place."""
        return {
            "weights": {"params": self.chosen, "statistics": self.statistics},
            "progress": {
                "step": self.step,
                "params": self.params,
                "opt_state": self.opt_state,
                "chosen_value": self.chosen_value,
                "chosen_count": self.chosen_count,
            },
        }

    @classmethod
    def from_parts(cls, parts: dict[str, Any]) -> "FinetuneState":
        weights = parts["weights"]
        return cls(chosen=weights["params"], statistics=weights["statistics"], **parts["progress"])


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
    """Returns the initial state, a function of `seed` and of a pretrained encoder's weights.

    Args:
      weights: (parameters, statistics) of the encoder; None starts from initial values.
      normalize: (mean, deviation) of log energies; None keeps the encoder's statistics.
    """
    rngs = nnx.Rngs(params=stream_key(seed, jnp.zeros((), jnp.int32), "params"))
    classifier = Classifier(model, head, num_classes, rngs)
    if weights is not None:
        classifier.load_backbone(*weights)
    if normalize is not None:
        classifier.backbone.input_norm.set_statistics(*normalize)
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
    """Returns the state after an evaluation whose parameters reached `value` on validation.

    `selection` says which parameters are tested in the end: "best" keeps them where the value is
    higher than before, "average" takes the running mean over the calls, "last" takes the newest.
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
) -> Callable[[FinetuneState, DeviceBatch], tuple[FinetuneState, Metrics]]:
    """Returns `(state, batch) -> (state, metrics)`; draws are functions of (seed, step, name)."""

    def train_step(state: FinetuneState, batch: DeviceBatch) -> tuple[FinetuneState, Metrics]:
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
        gradients, sums = steps.accumulate(gradient, examples, key("dropout"), accumulation_steps)
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


def make_predict(
    graph: nnx.GraphDef, loss: LossConfig
) -> Callable[[Any, Any, DeviceBatch], jax.Array]:
    """Returns `(params, statistics, batch) -> probabilities`, float32 [b, C]."""

    def predict(params: Any, statistics: Any, batch: DeviceBatch) -> jax.Array:
        num_frames_B = fbank.frame_count(batch["num_samples"])
        classifier = nnx.merge(graph, params, statistics)
        return classifier.probabilities(batch["audio"], num_frames_B, loss.name)

    return predict
