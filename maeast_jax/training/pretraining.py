"""A pretraining run: its configuration, data and mesh, and the programs compiled for them."""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from maeast_jax import checkpoint, fbank
from maeast_jax import config as configuration
from maeast_jax.data import Batch, DataConfig, mixture, pipeline
from maeast_jax.evaluation import open_knn, plots
from maeast_jax.inference import Pretrained, pretrained
from maeast_jax.model import ModelConfig, masking, tokens
from maeast_jax.runtime import distributed, sharding
from maeast_jax.training import loop, steps
from maeast_jax.training.optimizer import AdamWConfig, adamw, warmup_and_decay
from maeast_jax.training.steps import DeviceBatch, LossConfig, TrainState

# What a caller may train on in place of data sets: batches, or a function of the first step.
Batches = Iterator[Batch] | Callable[[int], Iterator[Batch]]
RECONSTRUCTIONS = "reconstructions"


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What is evaluated during pretraining: `eval` in config.pretrain()."""

    max_clips: int
    pictures: int
    knn: str
    knn_clips: int

    def __post_init__(self):
        for field in ("max_clips", "pictures", "knn_clips"):
            if getattr(self, field) < 0:
                raise ValueError(f"config.eval.{field}={getattr(self, field)} must not be negative")


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """A run's configuration, typed; config.pretrain() says what each field means."""

    seed: int
    total_steps: int
    batch_size: int
    accumulation_steps: int
    num_frames: int
    init_from: str
    log_every: int
    eval_every: int
    checkpoint_every: int
    keep: int
    model: ModelConfig
    loss: LossConfig
    optimizer: AdamWConfig
    data: DataConfig
    eval: EvalConfig
    mesh: dict[str, int]

    def __post_init__(self):
        for field in (
            "total_steps", "batch_size", "log_every", "eval_every", "checkpoint_every", "keep",
        ):  # fmt: skip
            if getattr(self, field) < 1:
                raise ValueError(f"config.{field}={getattr(self, field)} must be at least 1")
        if self.seed < 0:
            raise ValueError(f"config.seed={self.seed} must not be negative")
        if self.model.is_encoder_only:
            raise ValueError("model.decoder_layers=0 leaves no decoder to pretrain; set 1 or more")

    @classmethod
    def of(cls, config: ConfigDict) -> "PretrainConfig":
        """Raises ValueError, in one line, for a field that is unknown, missing or out of range."""
        configuration.check(config, configuration.pretrain())
        sections = {
            "model": ModelConfig, "loss": LossConfig, "optimizer": AdamWConfig,
            "data": DataConfig, "eval": EvalConfig,
        }  # fmt: skip
        return cls(**configuration.typed(config, sections))


class Pretraining:
    """A run before its first step: data opened, devices chosen, and all programs ready to compile.

    Attributes:
      config: its `model` has the architecture of `init_from`, if that is set.
      mesh: the devices.
      train_clips: None where noise or the caller's batches stand in for data sets.
      eval_clips: None for noise, and without evaluation.
      has_own_batches: whether the caller gives the training batches.
      has_eval: whether there are held-out clips; nearest neighbours need none.
      knn: None where no data set is named for it.
      abstract_state: shapes, types and shardings of the state.
    """

    def __init__(self, config: PretrainConfig, batches: Batches | None = None):
        """Raises ValueError, in one line, for what cannot work; compiles nothing."""
        self.config = config
        self._batches = batches
        self.has_own_batches = batches is not None
        if batches is not None and config.data.fbank == "host":
            raise ValueError(
                "data.fbank=host computes energies in the input pipeline, which the caller's "
                "batches bypass; set data.fbank=device"
            )
        self._learning_rate = warmup_and_decay(config.optimizer, config.total_steps)
        self._optimizer = adamw(config.optimizer, self._learning_rate)
        self.knn = None
        if config.eval.knn:
            rate = config.data.sample_rate_hz or None
            self.knn = open_knn(config.eval.knn, config.data.folder, rate, config.eval.knn_clips)
        self.has_eval = bool(config.data.eval) or (batches is None and config.data.has_eval)
        self.train_clips = pipeline.open_train(config.data) if batches is None else None
        self.eval_clips = pipeline.open_eval(config.data) if self.has_eval else None
        # Raises ValueError where no token would be masked.
        masking.num_kept(math.prod(config.model.grid(config.num_frames)), config.model.mask_ratio)
        self.mesh = sharding.make_mesh(**config.mesh)
        sharding.check_batch(self.mesh, config.batch_size, config.accumulation_steps)
        shapes = jax.eval_shape(self._initial_state)
        self._shardings = sharding.by_rules(self.mesh, shapes)
        self.abstract_state: TrainState = sharding.placed(shapes, self._shardings)
        # The rows of the global batch that this process feeds.
        self._rows = sharding.process_rows(self.mesh, config.batch_size)

    def compile_step(self) -> jax.stages.Compiled:
        """Compiles `(state, batch) -> (state, metrics)`, so that no step is slower."""
        step = steps.make_train_step(
            self.config.model,
            self.config.loss,
            self._optimizer,
            self._learning_rate,
            seed=self.config.seed,
            num_frames=self.config.num_frames,
            accumulation_steps=self.config.accumulation_steps,
        )
        out = (self._shardings, sharding.replicated(self.mesh))
        jitted = self._jit(step, out, donate_argnums=0)
        return jitted.lower(self.abstract_state, self._abstract_batch).compile()

    def initial_state(self, weights: Pretrained | None = None) -> TrainState:
        """Returns the state at step 0, with the weights of a checkpoint in place where given.

        A checkpoint without a decoder leaves the decoder at its initial values.
        """
        state = jax.jit(self._initial_state, out_shardings=self._shardings)()
        if weights is None:
            return state
        if weights.config.is_encoder_only:
            print(
                f"{weights.path} has no decoder: the decoder starts from initial values", flush=True
            )
        params, statistics = weights.read_weights()
        loaded = {"params": {**state.params, **params}, "statistics": statistics}
        places = {name: getattr(self._shardings, name) for name in loaded}
        return dataclasses.replace(state, **jax.device_put(loaded, places))

    def calibrate(self, state: TrainState, batch: DeviceBatch) -> TrainState:
        """Returns a new run's state with the input statistics of its first batch.

        Raises ValueError for a batch of silence, which has no scale.
        """
        calibrate = steps.make_calibrate(self.config.model, num_frames=self.config.num_frames)
        state = self._jit(calibrate, self._shardings, donate_argnums=0)(state, batch)
        if float(state.statistics["input_norm"]["variance"]) < tokens.BATCH_NORM_EPSILON:
            clips = self.train_clips
            raise ValueError(
                f"all {self.config.batch_size} clips of the first batch of "
                f"{clips.describe() if clips else 'the caller'} are silent, so there is nothing to "
                "learn: train on recordings that hold sound"
            )
        return state

    def train_batches(self, start_step: int = 0) -> Iterator[DeviceBatch]:
        """Yields the batches from `start_step` on, on the devices.

        Raises ValueError for a caller's batch with a field missing or of another shape or type.
        """
        for batch in self._host_batches(start_step):
            yield self._place(batch)

    def evaluate(
        self, state: TrainState, asked_to_stop: loop.AskedToStop
    ) -> loop.Evaluation | None:
        """Returns held-out means, pictures and the neighbours' score; None when interrupted."""
        values: dict[str, float] = {}
        pictures: dict[str, np.ndarray] = {}
        sums = []
        for index, batch in enumerate(self._eval_batches()):
            if asked_to_stop():
                return None
            placed = self._place(batch) | self._put({"mask": batch["mask"]})
            with distributed.others_alive():
                if index == 0 and self._reconstruct:
                    shown = jax.device_get(self._reconstruct(state, placed))
                    if distributed.is_first():
                        pictures[RECONSTRUCTIONS] = plots.reconstructions(*shown)
                sums.append(self._eval_step(state, placed, np.int32(index)))
                if len(sums) > loop.STEPS_IN_FLIGHT:
                    jax.block_until_ready(sums[-1 - loop.STEPS_IN_FLIGHT])
        if sums:
            with distributed.others_alive():
                values = loop.means(jax.device_get(sums))
        if self.knn is not None:
            if asked_to_stop():
                return None
            values |= self._ask_neighbours(state)
        return loop.Evaluation(state, values, pictures)

    @property
    def metadata(self) -> dict[str, Any]:
        """What a checkpoint says of itself: configuration and data sets."""
        opened = [clips.identity for clips in (self.train_clips, self.eval_clips) if clips]
        data = functools.reduce(operator.or_, opened, {})
        return {"config": dataclasses.asdict(self.config), "data": data}

    def _initial_state(self) -> TrainState:
        return steps.init_state(self.config.model, self._optimizer, self.config.seed)

    @functools.cached_property
    def _eval_step(self) -> Callable:
        return self._jit(
            steps.make_eval_step(
                self.config.model,
                self.config.loss,
                seed=self.config.seed,
                num_frames=self.config.num_frames,
            ),
            sharding.replicated(self.mesh),
        )

    @functools.cached_property
    def _reconstruct(self) -> Callable | None:
        """None where no pictures are asked for."""
        held_out = pipeline.eval_count(self.eval_clips, self.config.eval.max_clips)
        count = min(self.config.eval.pictures, held_out, self.config.batch_size)
        if not count:
            return None
        draw = steps.make_reconstruct(
            self.config.model,
            seed=self.config.seed,
            num_frames=self.config.num_frames,
            count=count,
        )
        return self._jit(draw, sharding.replicated(self.mesh))

    @functools.cached_property
    def _gather(self) -> Callable:
        return jax.jit(lambda weights: weights, out_shardings=sharding.replicated(self.mesh))

    def _jit(self, function: Callable, out_shardings: Any, **options) -> Callable:
        traced = sharding.traced_on(self.mesh, function)
        return jax.jit(traced, out_shardings=out_shardings, **options)

    @property
    def _abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, types and placement of the batch that a training step takes."""
        clips, frames = self.config.batch_size, self.config.num_frames
        name, shape, dtype = "audio", (clips, fbank.num_samples(frames)), np.int16
        if self.config.data.fbank == "host":
            name, shape, dtype = "fbank", (clips, frames, fbank.NUM_MEL_BANDS), np.float32
        return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.by_example(self.mesh))}

    def _host_batches(self, start_step: int) -> Iterator[Batch]:
        if self._batches is not None:
            return iter(self._batches(start_step) if callable(self._batches) else self._batches)
        return pipeline.train_batches(
            self.config.data,
            self.train_clips,
            start_step=start_step,
            total_steps=self.config.total_steps,
            **self._stream_settings(),
        )

    def _eval_batches(self) -> Iterator[Batch]:
        if not self.has_eval:
            return iter(())
        return pipeline.eval_batches(
            self.config.data,
            self.eval_clips,
            max_clips=self.config.eval.max_clips,
            **self._stream_settings(),
        )

    def _stream_settings(self) -> dict[str, Any]:
        return {
            "seed": self.config.seed,
            "batch_size": self.config.batch_size,
            "num_frames": self.config.num_frames,
            "rows": self._rows,
        }

    def _place(self, batch: Batch) -> DeviceBatch:
        """Puts the fields that a step takes, and no others, on this process's devices."""
        fields = {}
        for name, wanted in self._abstract_batch.items():
            if name not in batch:
                raise ValueError(f"a batch has the fields {sorted(batch)}, but {name!r} is needed")
            rows, shape = batch[name], (len(self._rows), *wanted.shape[1:])
            if rows.shape != shape or rows.dtype != wanted.dtype:
                raise ValueError(
                    f"a batch's {name!r} is {rows.dtype} {rows.shape}, but {wanted.dtype} {shape} "
                    f"is needed (this process's rows of batch_size={self.config.batch_size}, "
                    f"num_frames={self.config.num_frames})"
                )
            # A caller may fill the same array again, and jax keeps views of aligned arrays.
            fields[name] = rows if self._batches is None else np.array(rows)
        return self._put(fields)

    def _put(self, fields: Batch) -> DeviceBatch:
        return sharding.put_batch(self.mesh, fields, self.config.batch_size)

    def _ask_neighbours(self, state: TrainState) -> dict[str, float]:
        """Returns the neighbours' score in the first process, {} in the others."""
        with distributed.others_alive():
            weights = jax.block_until_ready(self._gather((state.params, state.statistics)))
        if not distributed.is_first():
            return {}
        params, statistics = jax.tree.map(lambda leaf: leaf.addressable_data(0), weights)
        return self.knn(self.config.model, params, statistics, self.config.num_frames)


def settle_architecture(
    config: PretrainConfig, workdir: epath.Path
) -> tuple[PretrainConfig, Pretrained | None]:
    """Returns the configuration with `init_from`'s architecture, and the checkpoint to start from.

    If the workdir has a checkpoint, the architecture comes from it, and `init_from` is not read.
    """
    if not config.init_from:
        return config, None
    has_own = bool(checkpoint.saved_steps(workdir))
    source = pretrained.read(workdir if has_own else config.init_from)
    settings = pretrained.with_architecture(dataclasses.asdict(config.model), source)
    return dataclasses.replace(config, model=ModelConfig(**settings)), source


def check_resume(run: Pretraining, workdir: epath.Path, step: int) -> None:
    """Prints the settings and the data sets that differ from those of the checkpoint at `step`.

    Raises ValueError, in one line, where the run cannot go on from it.
    """
    config = run.config
    newest = pretrained.read(workdir)
    folder = epath.Path(newest.path)
    if not checkpoint.has_part(folder, "progress"):
        raise checkpoint.CheckpointError(
            f"{workdir} holds weights alone, which no run can go on from; start one from them with "
            f"--config.init_from={workdir} and another --workdir"
        )
    for name in config.model.architecture_fields:
        was, is_ = getattr(newest.config, name), getattr(config.model, name)
        if was != is_:
            raise checkpoint.CheckpointError(
                f"the run in {workdir} has model.{name}={was!r}, the configuration {is_!r}; choose "
                "another --workdir"
            )
    if step > config.total_steps:
        raise ValueError(
            f"{workdir} has reached step {step}, past total_steps={config.total_steps}; "
            "raise total_steps or choose another --workdir"
        )
    old, new = checkpoint.metadata(folder), run.metadata
    changed = configuration.differences(old["config"], new["config"])
    if config.init_from and "init_from" in changed:
        raise checkpoint.CheckpointError(
            f"init_from={config.init_from!r} is for the start of a run, but that in {workdir} is "
            f"at step {step}; leave it out, or choose another --workdir"
        )
    configuration.tell_resumed_with(changed)
    # Checkpoints of earlier versions do not hold the data sets.
    for line in mixture.rebuilt(old.get("data", {}), new["data"]):
        print(line, flush=True)
