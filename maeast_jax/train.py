"""Pretraining: python -m maeast_jax.train --config=configs/pretrain.py --workdir=DIR

Exit codes: 0 when the last step is saved; 143 or 130 when SIGTERM or Ctrl-C stopped the run after
saving (the same command goes on from there); 1 for what the system refused (a full disk, a folder);
2 for a mistake in flags, configuration, data or checkpoint; 3 for a loss that is not finite. Fields
and their meaning: maeast_jax/config.py.
"""

import dataclasses
import os
from collections.abc import Callable

import jax
from ml_collections import ConfigDict

from maeast_jax import checkpoint, logs, program, run, sharding, summary
from maeast_jax.loop import Loop
from maeast_jax.run import Batches, Run
from maeast_jax.train_step import (
    TrainState,
    checkpoint_parts,
    init_state,
    make_calibrate,
    make_eval_step,
    make_reconstruct,
    make_train_step,
    state_from_parts,
)


def train(
    config: ConfigDict, workdir: str | os.PathLike, batches: Batches | None = None
) -> dict[str, float]:
    """Starts the run in `workdir`, or goes on with it; returns the last evaluation's metrics.

    `batches` stands in for `config.data`'s training set: any iterator of {"audio": int16 [b, S]},
    S = 400 + 160 (num_frames - 1) samples at 16 kHz, or a function of the first step that returns
    one, so that a resumed run goes on where the stream was.

    Raises ValueError, in one line, for what cannot work, before anything is compiled or
    overwritten; Interrupted after saving, on SIGTERM or Ctrl-C; NonFiniteError.
    """
    checked = run.check_run(config, workdir, batches)
    with run.alone(checked.workdir):
        if checked.start_step == config.total_steps:
            print(f"{workdir} has done its {config.total_steps} steps already", flush=True)
            return logs.last_row(checked.workdir, "eval")
        return _train(checked)


def _train(checked: Run) -> dict[str, float]:
    config, workdir = checked.config, checked.workdir
    replicated = sharding.replicated(checked.mesh)
    initial = jax.jit(
        lambda: init_state(checked.model, checked.optimizer, config.seed),
        out_shardings=replicated,
    )
    abstract_state = checkpoint.abstract(jax.eval_shape(initial), replicated)
    print("compiling the training step", flush=True)
    step = _compile_step(checked, abstract_state)
    checkpoints = checkpoint.Checkpoints(workdir, config.keep, config.to_dict())
    state = _first_state(checked, checkpoints, initial, abstract_state)
    checkpoint.write_config(workdir, config.to_dict())
    print(summary.describe(checked, abstract_state.params, step), flush=True)
    common = {"seed": config.seed, "num_frames": config.num_frames}
    calibrate = None
    if not checked.start_step and checked.init_from is None:
        calibrate = jax.jit(
            make_calibrate(checked.model, num_frames=config.num_frames),
            donate_argnums=0,
            out_shardings=replicated,
        )
    return Loop(
        config=config,
        workdir=workdir,
        start_step=checked.start_step,
        checkpoints=checkpoints,
        step=step,
        eval_step=jax.jit(make_eval_step(checked.model, checked.loss, **common)),
        reconstruct=jax.jit(make_reconstruct(checked.model, **common)),
        calibrate=calibrate,
        put=lambda batch: run.put_batch(checked, batch),
        put_eval=lambda batch: run.put_eval_batch(checked, batch),
        eval_batches=(lambda: run.eval_stream(checked)) if checked.has_eval else None,
        knn=_knn(checked),
    ).run(state, run.train_stream(checked))


def _knn(checked: Run) -> Callable[[TrainState], dict[str, float]] | None:
    if checked.knn is None:
        return None
    model, num_frames = checked.model, checked.config.num_frames
    return lambda state: checked.knn(model, state.params, state.statistics, num_frames)


def _compile_step(checked: Run, abstract_state: TrainState) -> jax.stages.Compiled:
    step = make_train_step(
        checked.model,
        checked.loss,
        checked.optimizer,
        checked.learning_rate,
        seed=checked.config.seed,
        num_frames=checked.config.num_frames,
        accumulation_steps=checked.config.accumulation_steps,
    )
    jitted = jax.jit(step, donate_argnums=0, out_shardings=sharding.replicated(checked.mesh))
    return jitted.lower(abstract_state, run.abstract_batch(checked)).compile()


def _first_state(
    checked: Run, checkpoints: checkpoint.Checkpoints, initial, abstract_state: TrainState
) -> TrainState:
    """The newest checkpoint's state, or initial values, with `init_from`'s weights if named."""
    parts = checkpoint_parts(abstract_state)
    if checked.start_step:
        return state_from_parts(checkpoints.restore(checked.start_step, parts))
    state = initial()
    if checked.init_from is None:
        return state
    params, statistics = checked.init_from.read_weights()
    if checked.init_from.config.is_encoder_only:
        print(
            f"{checked.init_from.path} has no decoder: the decoder starts from initial values",
            flush=True,
        )
    loaded = {"params": {**state.params, **params}, "statistics": statistics}
    return dataclasses.replace(state, **jax.device_put(loaded, sharding.replicated(checked.mesh)))


def main(config: ConfigDict, workdir: str) -> None:
    train(config, workdir)
    print(summary.farewell(os.path.expanduser(workdir)))


if __name__ == "__main__":
    program.run(main)
