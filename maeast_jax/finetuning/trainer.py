"""Trains a classifier on one fold, and scores sets of clips with it."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from maeast_jax import checkpoint
from maeast_jax import config as configuration
from maeast_jax.data import Labelled, labelled, mixture
from maeast_jax.evaluation import metrics
from maeast_jax.finetuning import step as finetune_step
from maeast_jax.finetuning.run import FinetuneRun, Sets
from maeast_jax.finetuning.step import FinetuneState
from maeast_jax.model import backbone_config, classifier_graph
from maeast_jax.runtime import sharding
from maeast_jax.training import (
    DeviceBatch,
    Evaluation,
    LoopConfig,
    MetricsWriter,
    Tracker,
    loop,
    optimizer,
)

# The start of the fields with other values of which a run may go on: they change neither what it
# has learnt so far nor what its scores mean. The stamp of a checkpoint stands for `init_from`.
_MAY_CHANGE = (
    "epochs", "total_steps", "accumulation_steps", "log_every", "init_from", "model.unroll",
    "model.remat", "mesh.", "data.dir", "data.threads", "data.test",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scored:
    """What a classifier says of every clip of a set, in the set's order.

    Attributes:
      ids: [n].
      probabilities: float32 [n, classes].
      targets: int labels [n], or float [n, classes] of 0 and 1 for several labels per clip.
    """

    ids: list[str]
    probabilities: np.ndarray
    targets: np.ndarray


class FoldTrainer:
    """The programs and data of one fold; `folder` holds its checkpoints and metrics."""

    def __init__(self, run: FinetuneRun, sets: Sets, folder: Path, tracker: Tracker | None = None):
        self._run, self._sets, self._folder, self._tracker = run, sets, folder, tracker
        self._length = run.length(sets)
        config = run.config
        rate = optimizer.by_epoch(
            config.schedule,
            config.optimizer.learning_rate,
            self._length.total_steps,
            self._length.steps_per_epoch,
        )
        self._optimizer = optimizer.adam(config.optimizer, rate)
        graph = classifier_graph(config.model, config.head, len(run.class_names))
        whole = sharding.replicated(run.mesh)
        self._shapes = jax.eval_shape(self._initial)
        self._shardings = sharding.by_rules(run.mesh, self._shapes)
        step = finetune_step.make_train_step(
            graph, run.loss, self._optimizer, rate, config.augment,
            seed=config.seed, accumulation_steps=config.accumulation_steps,
        )  # fmt: skip
        self._step = jax.jit(
            sharding.traced_on(run.mesh, step),
            donate_argnums=0,
            out_shardings=(self._shardings, whole),
        )
        self._choose = jax.jit(
            lambda state, value: finetune_step.choose(state, config.select, value),
            out_shardings=self._shardings,
        )
        predict = sharding.traced_on(run.mesh, finetune_step.make_predict(graph, run.loss))
        self._predict = jax.jit(predict, out_shardings=whole)

    def train(self, normalize: tuple[float, float] | None) -> FinetuneState:
        """Starts, or goes on from the newest checkpoint, and returns the last state.

        `normalize` is the (mean, deviation) of log energies; None takes the encoder's own. Raises
        Interrupted after saving, on SIGTERM or Ctrl-C; NonFiniteError.
        """
        config, length = self._run.config, self._length
        checkpoints = checkpoint.Checkpoints(self._folder, 1, _metadata(self._run, self._sets))
        start_step = checkpoints.latest_step() or 0
        if start_step:
            state = self._restore(checkpoints, start_step)
            print(f"resumed at step {start_step:,} of {length.total_steps:,}", flush=True)
        else:
            weights = self._run.init_from.read_weights() if self._run.init_from else None
            state = jax.device_put(self._initial(weights, normalize), self._shardings)
        state, _ = loop.run(
            state,
            self._step,
            self._train_batches(start_step),
            self.evaluate,
            checkpoints,
            MetricsWriter(self._folder, start_step, self._tracker),
            LoopConfig(
                start_step=start_step,
                total_steps=length.total_steps,
                batch_size=config.batch_size,
                log_steps=(1, *range(config.log_every, length.total_steps, config.log_every)),
                eval_steps=length.evaluations,
                checkpoint_steps=length.evaluations,
            ),
        )
        return state

    def evaluate(self, state: FinetuneState, asked_to_stop: loop.AskedToStop) -> Evaluation:
        """Scores the validation clips, and updates the parameters to be tested.

        It ignores requests to stop, because the checkpoint of this step must contain its choice.
        """
        del asked_to_stop
        scored = self.score(state.params, state.statistics, self._sets.valid)
        name, value = metrics.main_metric(scored.probabilities, scored.targets)
        number = self._length.evaluations.index(int(state.step)) + 1
        if self._run.config.select != "average" or number >= self._run.config.average_from:
            state = self._choose(state, np.float32(value))
        return Evaluation(state, {name: value})

    def score(self, params: Any, statistics: Any, clips: Labelled) -> Scored:
        """Returns probabilities of every clip of a set, in evaluation mode."""
        config = self._run.config
        ids, rows = [], []
        for batch, real in labelled.eval_batches(
            clips,
            batch_size=config.batch_size,
            num_frames=config.num_frames,
            max_frames=config.max_frames,
            least_frames=config.model.patch_shape[0],
            threads=config.data.threads,
        ):
            placed = sharding.put_batch(self._run.mesh, batch, config.batch_size)
            rows.append(np.asarray(self._predict(params, statistics, placed))[: len(real)])
            ids += [clip.id for clip in real]
        return Scored(ids, np.concatenate(rows), clips.truth)

    def _train_batches(self, start_step: int) -> Iterator[DeviceBatch]:
        config, train = self._run.config, self._sets.train
        chances = None
        if config.data.balanced:
            chances = labelled.rarity(train.classes, train.num_classes)
        for batch in labelled.train_batches(
            train,
            seed=config.seed,
            batch_size=config.batch_size,
            start_step=start_step,
            total_steps=self._length.total_steps,
            num_frames=config.num_frames,
            max_frames=config.max_frames,
            least_frames=config.model.patch_shape[0],
            chances=chances,
            threads=config.data.threads,
        ):
            yield sharding.put_batch(self._run.mesh, batch, config.batch_size)

    def _initial(self, weights=None, normalize=None) -> FinetuneState:
        config = self._run.config
        return finetune_step.init_state(
            config.model, config.head, len(self._run.class_names), self._optimizer,
            seed=config.seed, weights=weights, normalize=normalize,
        )  # fmt: skip

    def _restore(self, checkpoints: checkpoint.Checkpoints, step: int) -> FinetuneState:
        abstract = sharding.placed(self._shapes, self._shardings)
        return FinetuneState.from_parts(checkpoints.restore(step, abstract.parts()))


def check_resume(run: FinetuneRun, sets: Sets, folder: Path) -> None:
    """Prints the settings that differ from those of the run in a folder, if there is one.

    Raises ValueError where these settings made the run what it is, where its classes have other
    numbers, where a data set was built anew since, and where it has trained longer.
    """
    steps = checkpoint.saved_steps(folder)
    if not steps:
        return
    new = _metadata(run, sets)
    # Checkpoints of earlier versions hold only the configuration.
    old = new | checkpoint.metadata(checkpoint.find(folder))
    remedy = "choose another --workdir"
    if old["init_from"]["stamp"] != new["init_from"]["stamp"]:
        raise checkpoint.CheckpointError(
            f"the run in {folder} started from {old['init_from']['path']}, and "
            f"{new['init_from']['path']}, as it is now, is another start; {remedy}"
        )
    changed = configuration.differences(old["config"], new["config"])
    for name, (was, is_) in changed.items():
        if was is not None and not name.startswith(_MAY_CHANGE):
            raise checkpoint.CheckpointError(
                f"the run in {folder} has {name}={was!r}, the configuration {is_!r}; {remedy}"
            )
    was, is_ = old["class_names"], new["class_names"]
    if was != is_:
        gone, added = (", ".join(a for a in x if a not in y) for x, y in ((was, is_), (is_, was)))
        raise checkpoint.CheckpointError(
            f"the classes of {sets.train.text} are not those of the run in {folder} (gone: "
            f"{gone or 'none'}; new: {added or 'none'}); {remedy}"
        )
    if lines := mixture.rebuilt(old["data"], new["data"]):
        raise checkpoint.CheckpointError(
            f"{lines[0]}, and the run in {folder} cannot go on with it; {remedy}"
        )
    total_steps = run.length(sets).total_steps
    if steps[-1] > total_steps:
        raise ValueError(
            f"{folder} has reached step {steps[-1]}, past the {total_steps} steps of this run; "
            f"train for more epochs or {remedy}"
        )
    configuration.tell_resumed_with(changed)


def _metadata(run: FinetuneRun, sets: Sets) -> dict[str, Any]:
    """Returns what a checkpoint says of itself: configuration, start, classes and data sets."""
    # Where the head reads an earlier layer, the checkpoint holds the layers up to it only.
    model = backbone_config(run.config.model, run.config.head)
    start = run.init_from
    return {
        "config": dataclasses.asdict(dataclasses.replace(run.config, model=model)),
        "init_from": {
            "path": start.path if start else "initial values",
            "stamp": start.stamp if start else "",
        },
        "class_names": list(run.class_names),
        "is_multi_label": sets.train.is_multi_label,
        "longest_seconds": sets.train.longest_seconds,
        "data": sets.train.clips.identity | sets.valid.clips.identity,
    }
