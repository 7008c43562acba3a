"""A pretraining run before anything is compiled: its configuration checked, its inputs opened."""

import dataclasses
import fcntl
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from maeast_jax import checkpoint, data, fbank, logs, masking, sharding
from maeast_jax import config as configuration
from maeast_jax.mixture import Clips
from maeast_jax.model import ModelConfig
from maeast_jax.optimizer import OptimizerConfig, adamw, schedule
from maeast_jax.train_step import LossConfig

Batch = dict[str, np.ndarray]
Batches = Iterator[Batch] | Callable[[int], Iterator[Batch]]
# Fields that decide which arrays a checkpoint holds and what they mean.
ARCHITECTURE = (
    "tokens",
    "encoder_layers",
    "decoder_layers",
    "width",
    "heads",
    "mlp_width",
    "decoder_width",
    "pre_norm",
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A configuration that was checked, its data opened, its devices chosen; nothing compiled."""

    config: ConfigDict
    workdir: Path
    model: ModelConfig
    loss: LossConfig
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    data: data.DataConfig
    mesh: Mesh
    start_step: int  # of the newest checkpoint, 0 for a new run
    init_folder: epath.Path | None
    batches: Batches | None
    train_clips: Clips | None
    eval_clips: Clips | None
    has_eval: bool


def check_run(
    config: ConfigDict, workdir: str | os.PathLike, batches: Batches | None = None
) -> Run:
    """All that can be known to be wrong before compiling; raises ValueError in one line."""
    if "://" in os.fspath(workdir):
        raise ValueError(f"workdir {workdir} must be a folder of this machine")
    workdir = Path(workdir).expanduser()
    configuration.check(config)
    configuration.check_loop(config)
    settings = config.to_dict()
    model = ModelConfig(**settings["model"])
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
    start_step = _resume_step(workdir, settings)
    init_folder = _init_folder(settings) if config.init_from and not start_step else None
    has_eval = bool(data_config.eval) or (batches is None and data_config.has_eval)
    train_clips = data.open_train(data_config) if batches is None else None
    eval_clips = data.open_eval(data_config) if has_eval else None
    # Last: a mistake above leaves no empty folder behind.
    _check_workdir(workdir)
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
        init_folder=init_folder,
        batches=batches,
        train_clips=train_clips,
        eval_clips=eval_clips,
        has_eval=has_eval,
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
        shape = (wanted.shape[0] // jax.process_count(), *wanted.shape[1:])
        if batch[name].shape != shape or batch[name].dtype != wanted.dtype:
            raise ValueError(
                f"a batch's {name!r} is {batch[name].dtype} {batch[name].shape}, but "
                f"{wanted.dtype} {shape} is needed, by batch_size and num_frames"
            )
    return sharding.put_batch(run.mesh, {name: batch[name] for name in wanted_fields})


def put_eval_batch(run: Run, batch: Batch) -> dict[str, jax.Array]:
    """As `put_batch`, with `mask`, which says which rows count."""
    return put_batch(run, batch) | sharding.put_batch(run.mesh, {"mask": batch["mask"]})


@contextmanager
def alone(workdir: Path) -> Iterator[None]:
    """Holds a workdir for this process; raises ValueError where another one is at work in it.

    The lock is on an open file, so it ends with its process however that ends.
    """
    with (workdir / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is training in {workdir}; wait for it or choose another --workdir"
            ) from None
        yield


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


def _stream_settings(run: Run) -> dict[str, int]:
    return {
        "seed": run.config.seed,
        "batch_size": run.config.batch_size,
        "num_frames": run.config.num_frames,
        "process": jax.process_index(),
        "process_count": jax.process_count(),
    }


def _resume_step(workdir, settings: dict) -> int:
    steps = checkpoint.saved_steps(workdir)
    if not steps:
        return 0
    old = checkpoint.checkpoint_config(checkpoint.find(workdir))
    _check_architecture(old, settings, f"the run in {workdir}", "choose another --workdir")
    if steps[-1] > settings["total_steps"]:
        raise ValueError(
            f"{workdir} has reached step {steps[-1]}, past total_steps={settings['total_steps']}; "
            "raise total_steps or choose another --workdir"
        )
    if (Path(workdir) / logs.METRICS_FILE).exists():
        logs.read_metrics(workdir)  # raises where a line is broken
    changed = configuration.differences(old, settings)
    if changed:
        listed = ", ".join(f"{name} {was!r} -> {is_!r}" for name, (was, is_) in changed.items())
        print(f"resuming with other settings than before: {listed}", flush=True)
    return steps[-1]


def _init_folder(settings: dict) -> epath.Path:
    folder = checkpoint.find(settings["init_from"])
    old = checkpoint.checkpoint_config(folder)
    _check_architecture(old, settings, f"init_from {folder}", "set the model fields to match")
    return folder


def _check_architecture(old: dict, new: dict, what: str, remedy: str) -> None:
    for name in ARCHITECTURE:
        if old["model"][name] != new["model"][name]:
            raise checkpoint.CheckpointError(
                f"{what} has model.{name}={old['model'][name]!r}, the configuration "
                f"{new['model'][name]!r}; {remedy}"
            )


def _check_workdir(workdir) -> None:
    try:
        Path(workdir).mkdir(parents=True, exist_ok=True)
        probe = Path(workdir) / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"workdir {workdir} cannot be written ({error.strerror}); choose another --workdir"
        ) from error
