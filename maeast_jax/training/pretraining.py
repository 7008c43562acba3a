"""A pretraining run before anything is compiled: its configuration checked, its inputs opened."""

import copy
import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from maeast_jax import checkpoint, fbank
from maeast_jax import config as configuration
from maeast_jax.checkpoint import newest_step
from maeast_jax.data import Clips
from maeast_jax.data import pipeline as data
from maeast_jax.evaluation import KnnEval, open_knn
from maeast_jax.inference import Pretrained, pretrained
from maeast_jax.model import ModelConfig, masking
from maeast_jax.runtime import sharding, storage
from maeast_jax.training import metrics_writer
from maeast_jax.training.optimizer import OptimizerConfig, adamw, schedule
from maeast_jax.training.steps import LossConfig

Batch = dict[str, np.ndarray]
Batches = Iterator[Batch] | Callable[[int], Iterator[Batch]]


@dataclasses.dataclass(frozen=True)
class Run:
    """A configuration that was checked, its data opened, its devices chosen; nothing compiled."""

    config: ConfigDict
    workdir: epath.Path
    model: ModelConfig
    loss: LossConfig
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    data: data.DataConfig
    mesh: Mesh
    start_step: int  # of the newest checkpoint, 0 for a new run
    init_from: Pretrained | None  # whose weights a new run starts from
    batches: Batches | None
    train_clips: Clips | None
    eval_clips: Clips | None
    has_eval: bool
    knn: KnnEval | None


def check_run(
    config: ConfigDict, workdir: str | os.PathLike, batches: Batches | None = None
) -> Run:
    """All that can be known to be wrong before compiling; raises ValueError in one line."""
    workdir = storage.path(workdir)
    configuration.check(config)
    configuration.check_loop(config)
    start_step, config, init_from = _start(workdir, newest_step(workdir), config)
    settings = config.to_dict()
    model = ModelConfig(**settings["model"])
    if model.is_encoder_only:
        raise ValueError("model.decoder_layers=0 leaves no decoder to pretrain; set 1 or more")
    optimizer_config = OptimizerConfig(**settings["optimizer"])
    learning_rate = schedule(optimizer_config, config.total_steps)
    data_config = data.DataConfig(**settings["data"])
    if batches is not None and data_config.fbank == "host":
        raise ValueError(
            "data.fbank=host computes energies in the input pipeline, which the caller's batches "
            "bypass; set data.fbank=device"
        )
    masking.num_kept(math.prod(model.grid(config.num_frames)), model.mask_ratio)
    mesh = sharding.make_mesh(**settings["mesh"])
    sharding.check_batch(mesh, config.batch_size, config.accumulation_steps)
    has_eval = bool(data_config.eval) or (batches is None and data_config.has_eval)
    train_clips = data.open_train(data_config) if batches is None else None
    eval_clips = data.open_eval(data_config) if has_eval else None
    knn = _open_knn(config, data_config) if config.eval.knn else None
    # Last: a mistake above leaves no empty folder behind.
    storage.make_writable(workdir, "--workdir")
    return Run(
        config=config,
        workdir=workdir,
        model=model,
        loss=LossConfig(**settings["loss"]),
        optimizer=adamw(optimizer_config, learning_rate),
        learning_rate=learning_rate,
        data=data_config,
        mesh=mesh,
        start_step=start_step,
        init_from=init_from,
        batches=batches,
        train_clips=train_clips,
        eval_clips=eval_clips,
        has_eval=has_eval,
        knn=knn,
    )


def abstract_batch(run: Run) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, types and placement of what a training step takes."""
    clips, frames = run.config.batch_size, run.config.num_frames
    name, shape, dtype = "audio", (clips, fbank.num_samples(frames)), np.int16
    if run.data.fbank == "host":
        name, shape, dtype = "fbank", (clips, frames, fbank.NUM_MEL_BANDS), np.float32
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.by_example(run.mesh))}


def put_batch(run: Run, batch: Batch) -> dict[str, jax.Array]:
    """This process's rows of a batch to its devices: the fields a step takes, and no others.

    Raises ValueError where a field is missing or of another shape or type.
    """
    wanted_fields = abstract_batch(run)
    for name, wanted in wanted_fields.items():
        if name not in batch:
            raise ValueError(f"a batch has the fields {sorted(batch)}, but {name!r} is needed")
        shape = (len(_rows(run)), *wanted.shape[1:])
        if batch[name].shape != shape or batch[name].dtype != wanted.dtype:
            raise ValueError(
                f"a batch's {name!r} is {batch[name].dtype} {batch[name].shape}, but "
                f"{wanted.dtype} {shape} is needed, by num_frames and this process' rows of "
                f"batch_size={run.config.batch_size}"
            )
    fields = {name: batch[name] for name in wanted_fields}
    if run.batches is not None:
        # The caller may fill the same arrays again, and jax holds views of what it is given.
        fields = {name: np.array(rows) for name, rows in fields.items()}
    return _put(run, fields)


def put_eval_batch(run: Run, batch: Batch) -> dict[str, jax.Array]:
    """As `put_batch`, with `mask`, which says which rows count."""
    return put_batch(run, batch) | _put(run, {"mask": batch["mask"]})


def _put(run: Run, batch: Batch) -> dict[str, jax.Array]:
    return sharding.put_batch(run.mesh, batch, run.config.batch_size)


def describe_data(run: Run) -> list[str]:
    """Names and sizes of the data sets, for processes to compare."""
    return [clips.describe() for clips in (run.train_clips, run.eval_clips) if clips is not None]


def _rows(run: Run) -> np.ndarray:
    """Rows of the global batch that this process feeds."""
    return sharding.process_rows(run.mesh, run.config.batch_size)


def train_stream(run: Run) -> Iterator[Batch]:
    if run.batches is None:
        return data.train_batches(
            run.data,
            run.train_clips,
            start_step=run.start_step,
            total_steps=run.config.total_steps,
            **_stream_settings(run),
        )
    return iter(run.batches(run.start_step) if callable(run.batches) else run.batches)


def eval_stream(run: Run) -> Iterator[Batch]:
    return data.eval_batches(
        run.data, run.eval_clips, max_clips=run.config.eval.max_clips, **_stream_settings(run)
    )


def _open_knn(config: ConfigDict, data_config: data.DataConfig) -> KnnEval:
    try:
        data.prepare_tensorflow()
    except ValueError as error:
        raise ValueError(f"eval.knn={config.eval.knn!r}: {error}") from error
    rate = data_config.sample_rate_hz or None
    return open_knn(config.eval.knn, data_config.folder, rate, config.eval.knn_clips)


def _stream_settings(run: Run) -> dict[str, Any]:
    return {
        "seed": run.config.seed,
        "batch_size": run.config.batch_size,
        "num_frames": run.config.num_frames,
        "rows": _rows(run),
    }


def _start(
    workdir: epath.Path, step: int | None, config: ConfigDict
) -> tuple[int, ConfigDict, Pretrained | None]:
    """The step to go on from, the configuration with its architecture settled, and `init_from`.

    A configuration with `init_from` takes the architecture of that checkpoint; a run that is
    resumed has its own already, whether or not the other is still there.
    """
    newest = None if step is None else pretrained.read(workdir)
    init_from = None
    if config.init_from:
        init_from = newest or pretrained.read(config.init_from)
        settings = pretrained.with_architecture(config.model.to_dict(), init_from)
        config = copy.deepcopy(config)
        config.model.update(settings)
    if step is None:
        return 0, config, init_from
    _check_resume(workdir, step, newest, config)
    # A run stopped at step 0 holds the weights that it was to start from, and starts.
    return step, config, None if step else init_from


def _check_resume(workdir: epath.Path, step: int, newest: Pretrained, config: ConfigDict) -> None:
    if not checkpoint.has_part(epath.Path(newest.path), "progress"):
        raise checkpoint.CheckpointError(
            f"{workdir} holds weights alone, which no run can go on from; start one from them with "
            f"--config.init_from={workdir} and another --workdir"
        )
    wanted = ModelConfig(**config.model.to_dict())
    for name in wanted.architecture_fields:
        was, is_ = getattr(newest.config, name), getattr(wanted, name)
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
    if (workdir / metrics_writer.METRICS_FILE).exists():
        metrics_writer.read_metrics(workdir)  # raises where a line is broken
    old = checkpoint.metadata(epath.Path(newest.path))["config"]
    configuration.tell_resumed_with(configuration.differences(old, config.to_dict()))
