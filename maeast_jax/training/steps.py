"""State, training step, evaluation step and objectives of pretraining: pure functions, no I/O.

Names of shapes: B clips, S samples, T frames, F bands, N tokens, K kept, M masked, P values per
token.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from maeast_jax import fbank
from maeast_jax.model import (
    ModelConfig,
    Reconstruction,
    build,
    masking,
    model_graph,
    split_key,
    split_model,
    stream_key,
    take_tokens,
)

# The fields of a data.Batch, placed on the devices.
DeviceBatch = dict[str, jax.Array]
# Name -> (sum, count) over examples; who reads a value divides.
Metrics = dict[str, tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the two objectives: `loss` in config.pretrain()."""

    mse: float
    info_nce: float

    def __post_init__(self):
        if not (self.mse >= 0.0 and self.info_nce >= 0.0 and self.mse + self.info_nce > 0.0):
            raise ValueError(
                f"loss.mse={self.mse} and loss.info_nce={self.info_nce} must not be negative, nor "
                "both zero"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a checkpoint holds; no random state, since keys come from (seed, step, name)."""

    step: jax.Array
    params: Any
    statistics: Any
    opt_state: Any

    def parts(self) -> dict[str, Any]:
        """Returns the two parts of a checkpoint: what is learnt, and how far training is."""
        return {
            "weights": {"params": self.params, "statistics": self.statistics},
            "progress": {"step": self.step, "opt_state": self.opt_state},
        }

    @classmethod
    def from_parts(cls, parts: dict[str, Any]) -> "TrainState":
        return cls(**parts["weights"], **parts["progress"])


def init_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
    """Returns the initial state, a function of `seed` alone."""
    rngs = nnx.Rngs(params=stream_key(seed, jnp.zeros((), jnp.int32), "params"))
    _, params, statistics = split_model(build(config, rngs))
    return TrainState(jnp.zeros((), jnp.int32), params, statistics, optimizer.init(params))


def make_train_step(
    config: ModelConfig,
    loss: LossConfig,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    seed: int,
    num_frames: int,
    accumulation_steps: int = 1,
) -> Callable[[TrainState, DeviceBatch], tuple[TrainState, Metrics]]:
    """Returns `(state, batch) -> (state, metrics)` for a batch {audio [b, S]} or {fbank [b, T, F]}.

    Input statistics and masks are computed over the whole batch for any `accumulation_steps`, so
    that accumulating changes nothing but rounding and the dropout that is drawn.
    """
    graph = model_graph(config)
    objective = _objective(graph, loss)

    def train_step(state: TrainState, batch: DeviceBatch) -> tuple[TrainState, Metrics]:
        model = nnx.merge(graph, state.params, state.statistics)
        patches_BxNxP = model.normalized_patches(_features(batch, num_frames), training=True)
        _, _, statistics = split_model(model)
        mask_key = stream_key(seed, state.step, "mask")
        masks = _masks(config, mask_key, num_frames, patches_BxNxP.shape[0])
        dropout_key = stream_key(seed, state.step, "dropout")

        def gradient(examples, key):
            def mean_loss(params):
                terms_B = objective(params, state.statistics, examples, key)
                return jnp.mean(terms_B["loss"]), terms_B

            gradients, terms_B = jax.grad(mean_loss, has_aux=True)(state.params)
            return gradients, {name: jnp.sum(values_B) for name, values_B in terms_B.items()}

        gradients, sums = accumulate(
            gradient, (patches_BxNxP, masks), dropout_key, accumulation_steps
        )
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        one = jnp.ones((), jnp.float32)
        num_clips = one * patches_BxNxP.shape[0]
        metrics = {name: (total, num_clips) for name, total in sums.items()}
        metrics["grad_norm"] = (optax.tree.norm(gradients), one)
        metrics["learning_rate"] = (jnp.asarray(schedule(state.step), jnp.float32), one)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, statistics, opt_state), metrics

    return train_step


def make_calibrate(
    config: ModelConfig, *, num_frames: int
) -> Callable[[TrainState, DeviceBatch], TrainState]:
    """Returns `(state, batch) -> state`, which sets the running input statistics to the batch's.

    A new run does this with its first batch. torch starts at mean 0 and variance 1 and forgets them
    within 50 steps; evaluations before that would measure nothing but the wrong scale.
    """
    graph = model_graph(config)

    def calibrate(state: TrainState, batch: DeviceBatch) -> TrainState:
        model = nnx.merge(graph, state.params, state.statistics)
        model.input_norm.calibrate(_features(batch, num_frames))
        return dataclasses.replace(state, statistics=split_model(model)[2])

    return calibrate


def make_eval_step(
    config: ModelConfig, loss: LossConfig, *, seed: int, num_frames: int
) -> Callable[[TrainState, DeviceBatch, jax.Array], Metrics]:
    """Returns `(state, batch, batch_index) -> metrics`; rows whose `mask` is False do not count.

    Masks come from (seed, batch_index). They are the same at every evaluation, so that the points
    of a curve are comparable.
    """
    graph = model_graph(config)
    objective = _objective(graph, loss)

    def eval_step(state: TrainState, batch: DeviceBatch, batch_index: jax.Array) -> Metrics:
        patches_BxNxP = nnx.merge(graph, state.params, state.statistics).normalized_patches(
            _features(batch, num_frames), training=False
        )
        mask_key = stream_key(seed, batch_index, "eval_mask")
        masks = _masks(config, mask_key, num_frames, patches_BxNxP.shape[0])
        terms_B = objective(state.params, state.statistics, (patches_BxNxP, masks), None)
        count = jnp.sum(batch["mask"].astype(jnp.float32))
        return {
            name: (jnp.sum(jnp.where(batch["mask"], values_B, jnp.zeros_like(values_B))), count)
            for name, values_B in terms_B.items()
        }

    return eval_step


def make_reconstruct(
    config: ModelConfig, *, seed: int, num_frames: int, count: int
) -> Callable[[TrainState, DeviceBatch], Reconstruction]:
    """Returns `(state, batch) -> Reconstruction`, of the batch's first `count` clips.

    The masks are those of evaluation batch 0.
    """
    graph = model_graph(config)

    def reconstruct(state: TrainState, batch: DeviceBatch) -> Reconstruction:
        model = nnx.merge(graph, state.params, state.statistics)
        few = {name: rows[:count] for name, rows in batch.items()}
        mask_key = stream_key(seed, jnp.zeros((), jnp.int32), "eval_mask")
        first_key = _pass_keys(mask_key, config.passes)[0]
        return model.reconstruct_fbank(_features(few, num_frames), first_key)

    return reconstruct


def _features(batch: DeviceBatch, num_frames: int) -> jax.Array:
    """Returns log energies [b, T, F]; raises ValueError, while tracing, for another length."""
    fbank_BxTxF = batch["fbank"] if "fbank" in batch else fbank.fbank(batch["audio"])
    if fbank_BxTxF.shape[1] != num_frames:
        raise ValueError(
            f"a batch holds {fbank_BxTxF.shape[1]} frames per clip, but num_frames={num_frames}; "
            f"give clips of {fbank.num_samples(num_frames)} samples"
        )
    return fbank_BxTxF


def _masks(config: ModelConfig, key, num_frames, num_clips) -> list[tuple[jax.Array, jax.Array]]:
    """Returns (kept, masked) token indices for each pass."""
    grid = config.grid(num_frames)
    return [
        masking.mask_tokens(pass_key, num_clips, grid, config.mask_ratio, config.mask)
        for pass_key in _pass_keys(key, config.passes)
    ]


def _pass_keys(key: jax.Array | None, passes: int) -> list[jax.Array] | list[None]:
    return [key] if passes == 1 else split_key(key, passes)


def _objective(graph: nnx.GraphDef, loss: LossConfig):
    """Returns `(params, statistics, (patches, masks), key) -> {term: float32 [b]}`.

    The first pass reconstructs and the last one classifies. With two passes XLA drops the head that
    a pass does not use.
    """

    def objective(params, statistics, examples, key) -> dict[str, jax.Array]:
        patches_BxNxP, masks = examples
        model = nnx.merge(graph, params, statistics)
        passes = [
            (
                model.pretrain(patches_BxNxP, kept_BxK, masked_BxM, pass_key),
                take_tokens(patches_BxNxP, masked_BxM),
            )
            for (kept_BxK, masked_BxM), pass_key in zip(
                masks, _pass_keys(key, len(masks)), strict=True
            )
        ]
        predictions, target_BxMxP = passes[0]
        mse_B = mean_squared_error(predictions.reconstruction, target_BxMxP)
        predictions, target_BxMxP = passes[-1]
        info_nce_B, accuracy_B = info_nce(predictions.classification, target_BxMxP)
        return {
            "loss": loss.mse * mse_B + loss.info_nce * info_nce_B,
            "mse": mse_B,
            "info_nce": info_nce_B,
            "info_nce_accuracy": accuracy_B,
        }

    return objective


def accumulate(gradient, examples, key: jax.Array, steps: int):
    """Returns mean gradients and summed metrics of `gradient` over `steps` parts of the batch."""
    if steps == 1:
        return gradient(examples, key)
    # Part i holds rows i, i + steps, ...: every device has as many rows in each part, so that no
    # row leaves its device.
    parts = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(x.shape[0] // steps, steps, *x.shape[1:]), 1, 0), examples
    )

    def body(sums, part_and_key):
        return jax.tree.map(jnp.add, sums, gradient(*part_and_key)), None

    shapes = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], parts), key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (gradients, sums), _ = jax.lax.scan(body, zeros, (parts, jax.random.split(key, steps)))
    return jax.tree.map(lambda x: x / steps, gradients), sums


def mean_squared_error(reconstruction_BxMxP: jax.Array, target_BxMxP: jax.Array) -> jax.Array:
    """Returns float32 [b], the mean over a clip's masked patches and their values."""
    return jnp.mean(jnp.square(reconstruction_BxMxP - target_BxMxP), axis=(1, 2))


def info_nce(prediction_BxMxP: jax.Array, target_BxMxP: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (loss, accuracy), float32 [b] each, of InfoNCE among the masked patches of a clip.

    Row m scores every masked patch by the plain dot product and should pick the m-th. The authors'
    criterion has no temperature and does not normalise the vectors. A blind guess costs log(M). A
    row whose best score is shared by k patches counts as right by 1 / k: the patches of a silent
    clip are all alike, and an answer that takes any of them is a blind guess.
    """
    scores_BxMxM = jnp.einsum(
        "bmp,bnp->bmn",
        prediction_BxMxP,
        target_BxMxP,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    # The gradient of jnp.diagonal would be a scatter.
    is_own_MxM = jnp.eye(scores_BxMxM.shape[1], dtype=bool)
    own_BxM = jnp.sum(jnp.where(is_own_MxM, scores_BxMxM, jnp.float32(0)), axis=-1)
    loss_BxM = jax.nn.logsumexp(scores_BxMxM, axis=-1) - own_BxM
    best_BxMx1 = jnp.max(scores_BxMxM, axis=-1, keepdims=True)
    num_best_BxM = jnp.sum(scores_BxMxM == best_BxMx1, axis=-1).astype(jnp.float32)
    is_best_BxM = (own_BxM == best_BxMx1[..., 0]).astype(jnp.float32)
    return jnp.mean(loss_BxM, axis=1), jnp.mean(is_best_BxM / num_best_BxM, axis=1)
