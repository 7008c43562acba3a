"""The training loop: steps, late metrics, evaluations, checkpoints, and an orderly stop."""

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Iterator

import jax
import numpy as np
from ml_collections import ConfigDict

from maeast_jax.checkpoint import Checkpoints
from maeast_jax.evaluation import plots
from maeast_jax.runtime import distributed, storage, terminal
from maeast_jax.runtime.cli import Interrupted, NonFiniteError, PeerLostError
from maeast_jax.training import metrics_writer
from maeast_jax.training.pace import Pace
from maeast_jax.training.steps import Metrics, TrainState, checkpoint_parts

Batch = dict[str, np.ndarray]
# Steps handed to the device ahead of the one it works on: enough to keep it busy, few enough
# that their batches do not fill its memory.
STEPS_IN_FLIGHT = 2
RECONSTRUCTIONS = "reconstructions.png"
CURVES = "curves.png"
# What an evaluation's line shows, of what there is.
_TOLD = ("loss", "mse", "info_nce", "knn_accuracy", "knn_map")


class Loop:
    """Runs steps over a stream of batches; everything with a side effect in training is here.

    `step`, `eval_step`, `reconstruct` (None: no pictures), `calibrate` (None: a checkpoint has the
    statistics) and `knn` (None: not asked) are those of programs.py; `put` and `put_eval` place a
    host batch on the devices; `eval_batches` starts a pass over the evaluation set (None: no
    evaluation).
    """

    def __init__(
        self,
        *,
        config: ConfigDict,
        workdir: str | os.PathLike,
        start_step: int,
        checkpoints: Checkpoints,
        step: Callable,
        eval_step: Callable,
        reconstruct: Callable | None,
        calibrate: Callable | None,
        put: Callable[[Batch], dict[str, jax.Array]],
        put_eval: Callable[[Batch], dict[str, jax.Array]],
        eval_batches: Callable[[], Iterator[Batch]] | None,
        knn: Callable[[TrainState], dict[str, float]] | None = None,
    ):
        self._config = config
        self._workdir = storage.path(workdir)
        self._start_step = start_step
        self._checkpoints = checkpoints
        self._step = step
        self._eval_step = eval_step
        self._reconstruct = reconstruct
        self._calibrate = calibrate
        self._put = put
        self._put_eval = put_eval
        self._eval_batches = eval_batches
        self._knn = knn
        # Of several processes the first alone writes; all compute what is written.
        self._writer = (
            metrics_writer.MetricsWriter(workdir, start_step) if distributed.is_first() else None
        )
        stream = None if self._writer else open(os.devnull, "w")  # noqa: SIM115 (for good)
        self._progress = terminal.Progress(config.total_steps, start_step, stream)
        self._pace = Pace(config.batch_size, config.total_steps, config.eval_every)
        # Steps since the last line, and the closed intervals whose values are still on the device.
        self._interval: list[tuple[int, Metrics]] = []
        self._closed: list[tuple[int, float | None, list[tuple[int, Metrics]]]] = []

    def run(self, state: TrainState, batches: Iterator[Batch]) -> dict[str, float]:
        """To the last step, or to Interrupted or NonFiniteError; the last evaluation's metrics."""
        total_steps = self._config.total_steps
        evaluation: dict[str, float] | None = {}
        stream = batches
        try:
            with distributed.others_alive(), distributed.stopping() as self._asked_to_stop:
                if self._calibrate is not None:
                    first = _next(batches, 0)
                    batches = itertools.chain([first], batches)
                    state = self._calibrate(state, self._put(first))
                if self._is_due(self._start_step, self._config.eval_every):
                    # The run before may have been stopped on its way through this evaluation.
                    evaluation = self._evaluate(state, self._start_step)
                for step in range(self._start_step, total_steps):
                    # Saved before the next batch is taken: the state has seen `step` batches. Read
                    # once: a signal between two looks would stop without having saved.
                    stopping = self._asked_to_stop()
                    due = step > self._start_step and step % self._config.checkpoint_every == 0
                    if stopping:
                        self._catch_up(step)
                        self._progress.say(f"asked to stop: saving step {step}")
                    if stopping or due:
                        self._save(state, step)
                    if stopping:
                        self._checkpoints.wait()
                        raise Interrupted(stopping, step)
                    state, metrics = self._step(state, self._put(_next(batches, step)))
                    self._interval.append((step + 1, metrics))
                    if len(self._interval) > STEPS_IN_FLIGHT:
                        jax.block_until_ready(self._interval[-1 - STEPS_IN_FLIGHT])
                    if self._is_due(step + 1, self._config.log_every):
                        self._log(step + 1)
                    if self._is_due(step + 1, self._config.eval_every):
                        evaluation = self._evaluate(state, step + 1)
                self._save(state, total_steps)
                self._checkpoints.wait()
                if (stopping := self._asked_to_stop()) and evaluation is None:
                    # The same command makes up for the last evaluation.
                    raise Interrupted(stopping, total_steps)
        except PeerLostError:
            raise  # at once: a save under way would wait for the one that is gone
        except BaseException:
            # Not what became of a save under way, but what went wrong first is told.
            with contextlib.suppress(Exception):
                self._checkpoints.close()
            raise
        finally:
            if hasattr(stream, "close"):
                # Now, not as the interpreter ends: tf.data would then wait for ever for its
                # threads, which wait for the interpreter.
                stream.close()
            self._progress.close()
            if self._writer:
                self._writer.close()
        self._checkpoints.close()
        return evaluation

    def _is_due(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self._config.total_steps

    def _log(self, step: int) -> None:
        """Closes the interval that ends here, writes the one before: the device never waits."""
        self._closed.append((step, self._pace.rate(step), self._interval))
        self._interval = []
        if len(self._closed) > 1:
            self._write(*self._closed.pop(0))

    def _flush(self) -> None:
        """Writes all closed intervals; waits for the device."""
        while self._closed:
            self._write(*self._closed.pop(0))

    def _write(self, step: int, clips_per_second: float | None, interval) -> None:
        values = self._finite(jax.device_get(interval))
        row = _means([metrics for _, metrics in values])
        row["learning_rate"] = _means([values[-1][1]])["learning_rate"]
        if clips_per_second is not None:
            row["clips_per_second"] = clips_per_second
        if self._writer:
            self._writer.write(step, "train", row)
        left = self._pace.seconds_left(step)
        self._progress.update(step, row["loss"], clips_per_second, left)

    def _finite(self, values: list[tuple[int, Metrics]]) -> list[tuple[int, Metrics]]:
        for step, metrics in values:
            for name in ("loss", "grad_norm"):
                if not math.isfinite(metrics[name][0]):
                    last = self._checkpoints.latest_step()
                    kept = "no checkpoint yet" if last is None else f"step {last} is saved"
                    raise NonFiniteError(
                        f"{name} is {float(metrics[name][0])} at step {step} ({kept}); lower "
                        "optimizer.learning_rate or raise optimizer.warmup_steps"
                    )
        return values

    def _catch_up(self, step: int) -> None:
        """Writes a line for every step so far; waits for the device."""
        if self._interval:
            self._log(step)
        self._flush()

    def _save(self, state: TrainState, step: int) -> None:
        # Read before saving: lines for steps up to a checkpoint are on the disk when it is, so that
        # none is lost to a kill; and a state past a loss that is not finite is never saved.
        self._catch_up(step)
        if self._writer:
            self._writer.flush()
        self._checkpoints.save(step, checkpoint_parts(state))

    def _evaluate(self, state: TrainState, step: int) -> dict[str, float] | None:
        """Writes and returns the held-out metrics; {} where there are none, None when stopped."""
        self._flush()
        if distributed.from_first(self._writer is not None and self._writer.has(step, "eval")):
            return {}
        with self._pace.evaluation():
            row = self._scores(state, step)
            if row and self._writer:
                self._writer.write(step, "eval", row)
                self._writer.flush()
                terms = (f"{name} {row[name]:.4f}" for name in _TOLD if name in row)
                self._progress.say(f"step {step}: held-out {', '.join(terms)}")
                curves = plots.curves(metrics_writer.read_metrics(self._workdir))
                plots.write_png(self._workdir / CURVES, curves)
        return row

    def _scores(self, state: TrainState, step: int) -> dict[str, float] | None:
        row = self._held_out(state, step) if self._eval_batches is not None else {}
        if self._knn is None or row is None:
            return row
        return None if self._asked_to_stop() else row | self._knn(state)

    def _held_out(self, state: TrainState, step: int) -> dict[str, float] | None:
        """Means over the evaluation set; None when stopped on the way."""
        sums = []
        for index, batch in enumerate(self._eval_batches()):
            if self._asked_to_stop():
                return None
            placed = self._put_eval(batch)
            if index == 0:
                self._picture(state, step, placed)
            sums.append(self._eval_step(state, placed, np.int32(index)))
            if len(sums) > STEPS_IN_FLIGHT:
                jax.block_until_ready(sums[-1 - STEPS_IN_FLIGHT])
        return _means(jax.device_get(sums))

    def _picture(self, state: TrainState, step: int, batch: dict[str, jax.Array]) -> None:
        """Held-out clips: what they are, what the encoder saw, what came back."""
        if self._reconstruct is None:
            return
        shown = jax.device_get(self._reconstruct(state, batch))
        if self._writer:
            image = plots.reconstructions(*shown)
            self._writer.image(step, "reconstructions", image)
            plots.write_png(self._workdir / RECONSTRUCTIONS, image)


def _means(metrics: list[Metrics]) -> dict[str, float]:
    """(sum, count) pairs of several batches as one mean each."""
    return {
        name: math.fsum(m[name][0] for m in metrics) / math.fsum(m[name][1] for m in metrics)
        for name in metrics[0]
    }


def _next(batches: Iterator[Batch], step: int) -> Batch:
    try:
        return next(batches)
    except StopIteration:
        raise ValueError(
            f"the batches ended before step {step}; give an endless iterator or lower total_steps"
        ) from None
