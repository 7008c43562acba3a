"""Pretraining: python -m maeast_jax.train --config=configs/pretrain.py --workdir=DIR

Exit codes:
  0    the last step is saved
  1    the system refused something: a full disk, a folder, memory
  2    a mistake in flags, configuration, data or checkpoint
  3    a loss that is not finite
  70   an error that none of these explains, such as a failed device
  75   another process of the run was lost
  143 or 130   SIGTERM or Ctrl-C: training was saved if it had begun
  129 or 138   SIGHUP, as from a closed SSH window, or SIGUSR1: likewise

After 70 and above the same command goes on from the newest checkpoint. maeast_jax/config.py
says what each field means, and docs/running.md how several processes share a run (--distributed).
"""

import contextlib
import os
from collections.abc import Iterator

import jax
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from maeast_jax import checkpoint
from maeast_jax.inference import Pretrained
from maeast_jax.runtime import cli, distributed, environment, memory, storage, terminal
from maeast_jax.training import (
    Batches,
    DeviceBatch,
    LoopConfig,
    MetricsWriter,
    PretrainConfig,
    Pretraining,
    TrainState,
    loop,
    metrics_writer,
    pretraining,
    summary,
    trackers,
)

_REMEDY = (
    "lower batch_size, raise accumulation_steps, set model.remat=full with model.unroll=false, or "
    "share the model by mesh.fsdp"
)


def train(
    config: ConfigDict,
    workdir: str | os.PathLike,
    batches: Batches | None = None,
    tracker: str = "",
) -> dict[str, float]:
    """Starts the run in `workdir`, or goes on with it; returns the last evaluation's metrics.

    `batches` stands in for `config.data`'s training set: any iterator of {"audio": int16 [b, S]},
    S = 400 + 160 (num_frames - 1) samples at 16 kHz. For a run that may be resumed, give a function
    of the first step that returns such an iterator. Each of several processes gives its own rows
    only (`sharding.process_rows`).

    `tracker` names a service that gets the metrics too: wandb or trackio.

    Raises ValueError, in one line, for what cannot work, before anything is compiled or
    overwritten; Interrupted after saving, on SIGTERM or Ctrl-C; NonFiniteError; PeerLostError where
    another process of the run is gone; MemoryError where a step does not fit the devices.
    """
    workdir = storage.path(workdir)
    trackers.check(tracker)
    typed = PretrainConfig.of(config)
    checkpoint.read_config(workdir, mode=None)  # raises for the workdir of a fine-tuned run
    typed, init_from = pretraining.settle_architecture(typed, workdir)
    run = Pretraining(typed, batches)
    distributed.agree("the configuration", run.metadata["config"])
    distributed.agree("the data sets", run.metadata["data"])
    # After all checks, so that a mistake leaves no empty folder behind.
    checkpoint.make_workdir(workdir)
    with checkpoint.held(workdir), memory.out_of_memory(_REMEDY):
        newest_step = checkpoint.newest_step(workdir)
        if newest_step is not None:
            pretraining.check_resume(run, workdir, newest_step)
        if distributed.from_first(_is_done(run, workdir, newest_step)):
            print(f"{workdir} has done its {typed.total_steps} steps already", flush=True)
            return metrics_writer.last_row(workdir, "eval")
        if newest_step and batches is not None and not callable(batches):
            raise ValueError(
                f"{workdir} goes on from step {newest_step}, where an iterator would give its "
                "first batches again; give a function of the first step that returns an iterator"
            )
        return _train(run, workdir, newest_step or 0, init_from, tracker)


def _is_done(run: Pretraining, workdir: epath.Path, newest_step: int | None) -> bool:
    """Returns whether the last step is saved, and evaluated where there is anything to evaluate."""
    if newest_step != run.config.total_steps:
        return False
    evaluates = run.has_eval or run.knn is not None
    return not evaluates or metrics_writer.has_row(workdir, newest_step, "eval")


def _train(
    run: Pretraining,
    workdir: epath.Path,
    start_step: int,
    init_from: Pretrained | None,
    tracker: str,
) -> dict[str, float]:
    config = run.config
    print(summary.describe(run, workdir, start_step, init_from), flush=True)
    checkpoints = checkpoint.Checkpoints(workdir, config.keep, run.metadata)
    if start_step:
        # Before compiling, which takes minutes: the checkpoint may be damaged.
        parts = checkpoints.restore(start_step, run.abstract_state.parts())
        state = TrainState.from_parts(parts)
    else:
        state = run.initial_state(init_from)
    started = ""
    if distributed.is_first():
        start = environment.describe() | {"start_step": start_step, **run.metadata}
        started = checkpoint.record_start(workdir, start)
    tracking = trackers.Tracker(tracker, workdir, started, run.metadata["config"])
    writer = MetricsWriter(workdir, start_step, tracking)
    print("compiling the training step", flush=True)
    step = run.compile_step()
    planned = memory.planned_bytes(step)
    print(f"compiled: {terminal.si(planned, 'B')} planned per device", flush=True)
    # On CPUs all processes may run on this machine, so the plan counts every device.
    memory.keep_freed(jax.device_count() * planned)
    batches = run.train_batches(start_step)
    if not start_step and init_from is None:
        first = loop.next_batch(batches, 0)
        state = run.calibrate(state, first)
        batches = _with_first(first, batches)
    if distributed.is_first():
        checkpoint.write_config(workdir, run.metadata["config"])
    total = config.total_steps
    _, values = loop.run(
        state,
        step,
        batches,
        run.evaluate,
        checkpoints,
        writer,
        LoopConfig(
            start_step=start_step,
            total_steps=total,
            batch_size=config.batch_size,
            log_steps=range(config.log_every, total, config.log_every),
            eval_steps=range(0, total, config.eval_every),
            checkpoint_steps=range(config.checkpoint_every, total, config.checkpoint_every),
        ),
    )
    return values


def _with_first(first: DeviceBatch, rest: Iterator[DeviceBatch]) -> Iterator[DeviceBatch]:
    with contextlib.closing(rest):
        yield first
        yield from rest


def main(config: ConfigDict, workdir: str) -> None:
    train(config, workdir, tracker=flags.FLAGS.tracker)
    if distributed.is_first():
        print(summary.farewell(os.path.expanduser(workdir)))


if __name__ == "__main__":
    memory.share_heap()
    flags.DEFINE_enum("tracker", "", ("", *trackers.TRACKERS), trackers.HELP)
    cli.run(main, join=distributed.initialize)
