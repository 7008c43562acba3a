"""Trains a classifier on one training set: steps, an evaluation an epoch, checkpoints, a stop."""

import contextlib
import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from maeast_jax import checkpoint
from maeast_jax import config as configuration
from maeast_jax.data import Labelled, labelled
from maeast_jax.evaluation import metrics
from maeast_jax.finetuning import step as steps
from maeast_jax.finetuning.length import fold_length
from maeast_jax.finetuning.run import FinetuneRun, Sets
from maeast_jax.finetuning.step import FinetuneState
from maeast_jax.model import backbone_config, classifier_graph
from maeast_jax.runtime import sharding, terminal
from maeast_jax.runtime.cli import Interrupted, NonFiniteError, stop_signals
from maeast_jax.training import metrics_writer
from maeast_jax.training.pace import Pace
from maeast_jax.training.steps import Metrics


@dataclasses.dataclass(frozen=True)
class Scored:
    """What a classifier says of every clip of a set, in the set's order.

    Attributes:
      ids: [n].
      probabilities: float32 [n, classes].
      targets: int labels [n], or float [n, classes] of 0 and 1 for several labels a clip.
    """

    ids: list[str]
    probabilities: np.ndarray
    targets: np.ndarray


class FoldTrainer:
    """Everything of one fold; `folder` holds its checkpoints and metrics."""

    def __init__(self, run: FinetuneRun, sets: Sets, folder: Path):
        self._run, self._sets, self._folder = run, sets, folder
        config = run.config
        self._mesh = run.mesh
        length = fold_length(config, len(sets.train))
        self._total_steps, self._evaluations = length.total_steps, length.evaluations
        rate = steps.schedule(
            run.schedule, run.optimizer.learning_rate, length.total_steps, length.steps_per_epoch
        )
        self._optimizer = steps.adam(run.optimizer, rate)
        graph = classifier_graph(run.model, run.head, len(run.class_names))
        whole = sharding.replicated(self._mesh)
        self._shardings = sharding.by_rules(self._mesh, jax.eval_shape(self._initial))
        step = steps.make_train_step(
            graph, run.loss, self._optimizer, rate, run.augment,
            seed=config.seed, accumulation_steps=config.accumulation_steps,
        )  # fmt: skip
        self._step = jax.jit(
            sharding.traced_on(self._mesh, step),
            donate_argnums=0,
            out_shardings=(self._shardings, whole),
        )
        self._choose = jax.jit(
            lambda state, value: steps.choose(state, config.select, value),
            out_shardings=self._shardings,
        )
        predict = sharding.traced_on(self._mesh, steps.make_predict(graph, run.loss))
        self._predict = jax.jit(predict, out_shardings=whole)

    def train(self, normalize: tuple[float, float] | None) -> FinetuneState:
        """Starts, or goes on from the newest checkpoint, to the end; the last state.

        Raises Interrupted after saving, on SIGTERM or Ctrl-C; NonFiniteError.
        """
        settings = _settings(self._run)
        checkpoints = checkpoint.Checkpoints(self._folder, 1, settings)
        state, start_step = self._first_state(checkpoints, normalize), 0
        if (latest := checkpoints.latest_step()) is not None:
            state, start_step = self._restore(checkpoints, latest, state), latest
            print(f"resumed at step {latest:,} of {self._total_steps:,}", flush=True)
        writer = metrics_writer.MetricsWriter(self._folder, start_step)
        progress = terminal.Progress(self._total_steps, start_step)
        try:
            with stop_signals() as stop:
                state = self._run_steps(state, start_step, checkpoints, writer, progress, stop)
        except BaseException:
            # Not what became of a save under way, but what went wrong first is told.
            with contextlib.suppress(Exception):
                checkpoints.close()
            raise
        finally:
            progress.close()
            writer.close()
        checkpoints.close()
        return state

    def score(self, params: Any, statistics: Any, clips: Labelled) -> Scored:
        """Every clip of a set, each once, in evaluation mode."""
        config = self._run.config
        ids, rows, classes = [], [], []
        for batch, real in labelled.eval_batches(
            clips,
            batch_size=config.batch_size,
            num_frames=config.num_frames,
            max_frames=config.max_frames,
            threads=config.data.threads,
        ):
            placed = sharding.put_batch(self._mesh, batch, config.batch_size)
            found = self._predict(params, statistics, placed)
            rows.append(np.asarray(found)[: len(real)])
            ids += [clip.id for clip in real]
            classes += [clip.classes for clip in real]
        return Scored(ids, np.concatenate(rows), labelled.truth(clips, classes))

    def _first_state(self, checkpoints, normalize) -> FinetuneState:
        run = self._run
        weights = None
        if run.init_from is not None and checkpoints.latest_step() is None:
            weights = run.init_from.read_weights()
        return jax.device_put(self._initial(weights, normalize), self._shardings)

    def _initial(self, weights=None, normalize=None) -> FinetuneState:
        run = self._run
        return steps.init_state(
            run.model, run.head, len(run.class_names), self._optimizer,
            seed=run.config.seed, weights=weights, normalize=normalize,
        )  # fmt: skip

    def _restore(self, checkpoints, step: int, state: FinetuneState) -> FinetuneState:
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
        )
        return _from_parts(checkpoints.restore(step, _parts(abstract)))

    def _run_steps(self, state, start_step, checkpoints, writer, progress, stop) -> FinetuneState:
        config, train = self._run.config, self._sets.train
        chances = None
        if config.data.balanced:
            chances = labelled.rarity(labelled.read_classes(train), train.num_classes)
        batches = labelled.train_batches(
            train,
            seed=config.seed,
            batch_size=config.batch_size,
            start_step=start_step,
            total_steps=self._total_steps,
            num_frames=config.num_frames,
            max_frames=config.max_frames,
            chances=chances,
            threads=config.data.threads,
        )
        pace = Pace(
            config.batch_size, self._total_steps, self._total_steps / len(self._evaluations)
        )
        unread: list[tuple[int, Metrics]] = []  # since they were looked at for the last time
        for step, batch in enumerate(batches, start_step + 1):
            placed = sharding.put_batch(self._mesh, batch, config.batch_size)
            state, row = self._step(state, placed)
            unread.append((step, row))
            is_logged = step % config.log_every == 0 or step in (1, self._total_steps)
            # Every step's, and first: a state past a loss that is not finite is neither scored nor
            # saved.
            if is_logged or step in self._evaluations:
                values = _finite(unread)
                unread = []
            if is_logged:
                rate = pace.rate(step)
                if rate is not None:
                    values["clips_per_second"] = rate
                writer.write(step, "train", values)
                progress.update(step, values["loss"], rate, pace.seconds_left(step))
            if step in self._evaluations:
                with pace.evaluation():
                    state = self._evaluate(state, step, writer, progress)
                checkpoints.save(step, _parts(state))
            if stop:
                _finite(unread)
                checkpoints.save(step, _parts(state))
                checkpoints.wait()
                raise Interrupted(stop[0], step)
        return state

    def _evaluate(self, state, step: int, writer, progress) -> FinetuneState:
        config = self._run.config
        number = self._evaluations.index(step) + 1
        scored = self.score(state.params, state.statistics, self._sets.valid)
        name, value = metrics.main_metric(scored.probabilities, scored.targets)
        writer.write(step, "eval", {name: value})
        progress.say(f"{number}/{len(self._evaluations)}: {name} on validation {value:.4f}")
        if config.select == "average" and number < config.average_from:
            return state
        return self._choose(state, np.float32(value))


def _settings(run: FinetuneRun) -> dict[str, Any]:
    """What a checkpoint says of itself: the configuration, with the model that it holds."""
    return run.config.to_dict() | {
        "model": dataclasses.asdict(backbone_config(run.model, run.head))
    }


def check_resume(run: FinetuneRun, folder: Path) -> None:
    """Raises CheckpointError where the run in a folder is of another model; tells what changed."""
    if not checkpoint.saved_steps(folder):
        return
    settings = _settings(run)
    old = checkpoint.metadata(checkpoint.find(folder))["config"]
    changed = configuration.differences(old, settings)
    for name, (was, is_) in changed.items():
        if name.startswith(("model.", "head.", "select", "mode")):
            raise checkpoint.CheckpointError(
                f"the run in {folder} has {name}={was!r}, the configuration {is_!r}; choose "
                "another --workdir"
            )
    configuration.tell_resumed_with(changed)


def _parts(state: FinetuneState) -> dict[str, Any]:
    """A checkpoint's parts: `weights` are those that are tested, as in pretraining's."""
    return {
        "weights": {"params": state.chosen, "statistics": state.statistics},
        "progress": {
            "step": state.step,
            "params": state.params,
            "opt_state": state.opt_state,
            "chosen_value": state.chosen_value,
            "chosen_count": state.chosen_count,
        },
    }


def _from_parts(parts: dict[str, Any]) -> FinetuneState:
    weights, progress = parts["weights"], parts["progress"]
    return FinetuneState(chosen=weights["params"], statistics=weights["statistics"], **progress)


def _finite(rows: list[tuple[int, Metrics]]) -> dict[str, float]:
    """The last step's values; NonFiniteError for the first whose loss or gradient is not finite."""
    values: dict[str, float] = {}
    for step, row in jax.device_get(rows):
        values = {name: float(a / b) for name, (a, b) in row.items()}
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                raise NonFiniteError(
                    f"{name} is {values[name]} at step {step}; lower optimizer.learning_rate or "
                    "set schedule.warmup_steps"
                )
    return values
