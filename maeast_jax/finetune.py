"""Fine-tuning, linear probes and nearest neighbours on labelled clips.

  python -m maeast_jax.finetune --config=configs/finetune_folder.py --workdir=DIR \\
      --config.init_from=CKPT --config.data.dir=DATA --config.data.train=NAME

maeast_jax/config.py says what each field means. Exit codes are those of maeast_jax.train; a run
that was stopped goes on by the same command.
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from maeast_jax import checkpoint
from maeast_jax import config as configuration
from maeast_jax.data import Labelled
from maeast_jax.evaluation import Evaluation, metrics, probe, results
from maeast_jax.finetuning import (
    Features,
    FinetuneRun,
    FoldTrainer,
    Scored,
    Sets,
    check_resume,
    open_run,
    statistics,
)
from maeast_jax.inference import classifier
from maeast_jax.runtime import cli, environment, memory, terminal
from maeast_jax.training import trackers

_REMEDY = "lower batch_size or max_frames, or raise accumulation_steps"


def finetune(
    config: ConfigDict, workdir: str | os.PathLike, tracker: str = ""
) -> dict[str, dict[str, Evaluation]]:
    """Trains, or goes on, and evaluates; returns evaluations by fold and by test set's name.

    Without folds the only fold is "". The files of each test set (evaluation/results.py) lie in
    `workdir/[FOLD/]NAME/`. `tracker` is that of `train`.

    Raises ValueError, in one line, for what cannot work, before anything is compiled or
    overwritten; Interrupted after saving, on SIGTERM or Ctrl-C; NonFiniteError; MemoryError where a
    batch does not fit the devices.
    """
    trackers.check(tracker)
    run = open_run(config, workdir)
    with checkpoint.held(run.workdir), memory.out_of_memory(_REMEDY):
        _check_workdir(run, config.to_dict())
        print(terminal.announce(_plan(run)), flush=True)
        features = Features(run) if run.config.mode != "finetune" else None
        # After all that may fail, so that a mistake does not make the workdir this mode's.
        checkpoint.write_config(run.workdir, config.to_dict())
        start = environment.describe() | {"config": config.to_dict(), "data": run.identity}
        started = checkpoint.record_start(run.workdir, start)
        found = {}
        for sets in run.folds:
            folder = run.workdir / sets.name
            if sets.name:
                print(f"\nfold {sets.name}", flush=True)
            if features:
                scored = _probe(run, sets, folder, features)
            else:
                tracking = trackers.Tracker(tracker, folder, started, config.to_dict())
                scored = _train(run, sets, folder, tracking)
            found[sets.name] = {
                name: _evaluate(run, sets, name, of_set) for name, of_set in scored.items()
            }
        if len(run.folds) > 1:
            print(f"\n{_fold_table(found)}", flush=True)
    return found


def _check_workdir(run: FinetuneRun, settings: dict[str, Any]) -> None:
    """Raises ValueError for a workdir of another run, whose results would be lost.

    A probe is fitted anew each time, so it replaces the results of other settings, and says so.
    """
    old = checkpoint.read_config(run.workdir, run.config.mode)
    if run.config.mode == "finetune":
        for sets in run.folds:
            check_resume(run, sets, run.workdir / sets.name)
    elif old and (changed := configuration.differences(old, settings)):
        described = configuration.describe(changed)
        print(f"replacing the results of other settings: {described}", flush=True)


def _train(
    run: FinetuneRun, sets: Sets, folder: Path, tracking: trackers.Tracker
) -> dict[str, Scored]:
    trainer = FoldTrainer(run, sets, folder, tracking)
    state = trainer.train(statistics(run, sets))
    return {
        name: trainer.score(state.chosen, state.statistics, clips)
        for name, clips in _tests(sets).items()
    }


def _probe(run: FinetuneRun, sets: Sets, folder: Path, features: Features) -> dict[str, Scored]:
    train_x, train_y, _ = features.of(sets.train)
    valid_x, valid_y, _ = features.of(sets.valid)
    fit = {"linear": probe.linear, "knn": probe.knn}[run.config.mode]
    fitted = fit(train_x, train_y, valid_x, valid_y, len(run.class_names))
    chosen = ", ".join(f"{name} {value:g}" for name, value in fitted.chosen.items())
    print(f"features {train_x.shape[1]} per clip; chosen on validation: {chosen}", flush=True)
    classifier.write_probe(
        folder,
        fitted.fitted,
        features.encoder,
        class_names=run.class_names,
        is_multi_label=sets.train.is_multi_label,
        longest_seconds=sets.train.longest_seconds,
    )
    scored = {}
    for name, clips in _tests(sets).items():
        test_x, test_y, ids = features.of(clips)
        scored[name] = Scored(ids, fitted.scores(test_x), test_y)
    return scored


def _tests(sets: Sets) -> dict[str, Labelled]:
    """Returns the test sets by the name of their folder."""
    named = {}
    for clips in sets.tests:
        name = clips.text.replace("/", "_").replace("@", "_").replace(",", "+")
        named[name] = clips
    return named


def _evaluate(run: FinetuneRun, sets: Sets, name: str, scored: Scored) -> Evaluation:
    folder = run.workdir / sets.name / name
    evaluation = metrics.evaluate(scored.probabilities, scored.targets, run.class_names)
    settings = {"config": dataclasses.asdict(run.config), "set": name}
    results.write(
        folder,
        evaluation,
        scored.ids,
        scored.probabilities,
        scored.targets,
        settings,
        sets.warnings,
    )
    print(f"\n{name}: {results.report(evaluation)}\n\nfiles: {folder}", flush=True)
    return evaluation


def _fold_table(found: Mapping[str, Mapping[str, Evaluation]]) -> str:
    """Returns a table with a row per fold, and one of mean and deviation over all."""
    values = {fold: next(iter(tests.values())) for fold, tests in found.items()}
    rows = {fold: {of_fold.metric: of_fold.value} for fold, of_fold in values.items()}
    metric = next(iter(values.values())).metric
    rows["all"] = {metric: [of_fold.value for of_fold in values.values()]}
    return results.table(rows)


def _plan(run: FinetuneRun) -> dict[str, str]:
    config, sets = run.config, run.folds[0]
    source = run.init_from.path if run.init_from else "initial values"
    lines = {
        "mode": config.mode,
        "encoder": f"{config.model.encoder_layers} layers of {config.model.width}, "
        f"{config.model.tokens} tokens, from {source}",
        "classes": f"{len(run.class_names)}: {', '.join(run.class_names[:8])}"
        + (", ..." if len(run.class_names) > 8 else ""),
        "train": f"{sets.train.text}: {len(sets.train):,} clips",
        "valid": f"{sets.valid.text}: {len(sets.valid):,} clips",
        "test": "; ".join(f"{clips.text}: {len(clips):,} clips" for clips in sets.tests),
    }
    if len(run.folds) > 1:
        lines["folds"] = f"{len(run.folds)}, each tested once: {config.data.folds}"
    if config.mode == "finetune":
        head = dataclasses.asdict(config.head)
        lines["head"] = ", ".join(f"{name} {value}" for name, value in head.items())
        length = run.length(sets)
        lines["steps"] = (
            f"{length.total_steps:,} of {config.batch_size} clips, "
            f"{length.total_steps / length.steps_per_epoch:.3g} epochs; tested: {config.select}"
        )
    else:
        lines["features"] = ", ".join(
            f"{name} {value}" for name, value in dataclasses.asdict(config.features).items()
        )
    warnings = [
        f"fold {sets.name}: {line}" if sets.name else line
        for sets in run.folds
        for line in sets.warnings
    ]
    if warnings:
        lines["warnings"] = "\n".join(warnings)
    lines["workdir"] = os.fspath(run.workdir)
    return lines


def farewell(workdir: str | os.PathLike, folds: Iterable[str]) -> str:
    """Returns the next command to type. Each fold has a classifier of its own."""
    # Without folds the only one is "".
    path = Path(workdir).expanduser() / next(iter(folds))
    command = f"python -m maeast_jax.predict FOLDER --checkpoint={path} --output=labels.tsv"
    return terminal.announce({"next": f"labels for your own files:\n{command}"})


def main(config: ConfigDict, workdir: str) -> None:
    found = finetune(config, workdir, flags.FLAGS.tracker)
    print(f"\n{farewell(workdir, found)}", flush=True)


if __name__ == "__main__":
    flags.DEFINE_enum("tracker", "", ("", *trackers.TRACKERS), trackers.HELP)
    cli.run(main)
