"""Pretraining: python -m maeast_jax.train --config=configs/pretrain.py --workdir=DIR

Exit codes: 0 when the last step is saved; 143 or 130 when SIGTERM or Ctrl-C stopped the run after
saving, 75 when another process of the run was lost, 70 after an error that is none of these, such
as of a device (the same command goes on from the newest checkpoint); 1 for what the system refused
(a full disk, a folder, memory); 2 for a mistake in flags, configuration, data or checkpoint; 3 for
a loss that is not finite. Fields and their meaning: maeast_jax/config.py. Several processes of one
run: --distributed, docs/running.md.
"""

import dataclasses
import os

import jax
from ml_collections import ConfigDict

from maeast_jax import checkpoint
from maeast_jax.checkpoint import held, newest_step
from maeast_jax.runtime import cli, distributed, memory, terminal
from maeast_jax.training import metrics_writer, pretraining, summary
from maeast_jax.training.loop import Loop
from maeast_jax.training.pretraining import Batches, Run
from maeast_jax.training.programs import Programs
from maeast_jax.training.steps import TrainState, checkpoint_parts, state_from_parts

_REMEDY = (
    "lower batch_size, raise accumulation_steps, set model.remat=full with model.unroll=false, or "
    "share the model by mesh.fsdp"
)


def train(
    config: ConfigDict, workdir: str | os.PathLike, batches: Batches | None = None
) -> dict[str, float]:
    """Starts the run in `workdir`, or goes on with it; returns the last evaluation's metrics.

    `batches` stands in for `config.data`'s training set: any iterator of {"audio": int16 [b, S]},
    S = 400 + 160 (num_frames - 1) samples at 16 kHz, or a function of the first step that returns
    one, so that a resumed run goes on where the stream was. Of several processes each gives its
    rows alone (`sharding.process_rows`).

    Raises ValueError, in one line, for what cannot work, before anything is compiled or
    overwritten; Interrupted after saving, on SIGTERM or Ctrl-C; NonFiniteError; PeerLostError where
    another process of the run is gone; MemoryError where a step does not fit the devices.
    """
    with memory.out_of_memory(_REMEDY):
        checked = pretraining.check_run(config, workdir, batches)
        distributed.agree("the configuration", checked.config.to_dict())
        distributed.agree("the data sets", pretraining.describe_data(checked))
        with held(checked.workdir):
            if (newest_step(workdir) or 0) != checked.start_step:
                # While this process looked, the run before was still saving; it has ended since.
                checked = pretraining.check_run(config, workdir, batches)
            if distributed.from_first(_is_done(checked)):
                print(f"{workdir} has done its {config.total_steps} steps already", flush=True)
                return metrics_writer.last_row(checked.workdir, "eval")
            return _train(checked)


def _is_done(checked: Run) -> bool:
    """Whether nothing is left to do, also of what the last step is evaluated on."""
    total_steps = checked.config.total_steps
    is_evaluated = checked.has_eval or checked.knn is not None
    return checked.start_step == total_steps and (
        not is_evaluated or metrics_writer.has_row(checked.workdir, total_steps, "eval")
    )


def _train(checked: Run) -> dict[str, float]:
    config, workdir = checked.config, checked.workdir
    programs = Programs(checked)
    print(summary.describe(checked, programs.abstract_state.params), flush=True)
    print("compiling the training step", flush=True)
    step = programs.step()
    planned = memory.planned_bytes(step)
    print(f"compiled: {terminal.si(planned, 'B')} planned a device", flush=True)
    # All processes of a run on CPUs may share this machine.
    memory.keep_freed(jax.device_count() * planned)
    checkpoints = checkpoint.Checkpoints(workdir, config.keep, config.to_dict())
    state = _first_state(checked, checkpoints, programs)
    if distributed.is_first():
        checkpoint.write_config(workdir, config.to_dict())
    is_new = not checked.start_step and checked.init_from is None
    return Loop(
        config=config,
        workdir=workdir,
        start_step=checked.start_step,
        checkpoints=checkpoints,
        step=step,
        eval_step=programs.eval_step(),
        reconstruct=programs.reconstruct(),
        calibrate=programs.calibrate() if is_new else None,
        put=lambda batch: pretraining.put_batch(checked, batch),
        put_eval=lambda batch: pretraining.put_eval_batch(checked, batch),
        eval_batches=(lambda: pretraining.eval_stream(checked)) if checked.has_eval else None,
        knn=programs.knn(),
    ).run(state, pretraining.train_stream(checked))


def _first_state(
    checked: Run, checkpoints: checkpoint.Checkpoints, programs: Programs
) -> TrainState:
    """The newest checkpoint's state, or initial values, with `init_from`'s weights if named."""
    if checked.start_step:
        parts = checkpoint_parts(programs.abstract_state)
        return state_from_parts(checkpoints.restore(checked.start_step, parts))
    state = programs.initial_state()
    if checked.init_from is None:
        return state
    params, statistics = checked.init_from.read_weights()
    if checked.init_from.config.is_encoder_only:
        print(
            f"{checked.init_from.path} has no decoder: the decoder starts from initial values",
            flush=True,
        )
    loaded = {"params": {**state.params, **params}, "statistics": statistics}
    shardings = {name: getattr(programs.shardings, name) for name in loaded}
    return dataclasses.replace(state, **jax.device_put(loaded, shardings))


def main(config: ConfigDict, workdir: str) -> None:
    train(config, workdir)
    if distributed.is_first():
        print(summary.farewell(os.path.expanduser(workdir)))


if __name__ == "__main__":
    memory.share_heap()
    cli.run(main, join=distributed.initialize)
