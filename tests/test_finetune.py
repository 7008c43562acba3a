"""Fine-tuning as a whole: what it says, what it leaves, that it stops and goes on, and refusals."""

import contextlib
import copy
import csv
import io
import json
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from recordings import TONES, tones

import maeast_jax
from maeast_jax import checkpoint
from maeast_jax import config as configuration
from maeast_jax.config import pretrain
from maeast_jax.data import writer
from maeast_jax.export import export
from maeast_jax.finetune import finetune
from maeast_jax.finetuning import FoldTrainer, open_run
from maeast_jax.finetuning.run import evaluations
from maeast_jax.runtime.cli import Interrupted, NonFiniteError
from maeast_jax.train import train
from maeast_jax.training import metrics_writer

pytest.importorskip("tensorflow_datasets")

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    splits = {"train": (24, 0), "valid": (9, 1), "test": (11, 2)}
    parts = {name: lambda c=c, s=s: tones(c, s) for name, (c, s) in splits.items()}
    writer.write("tones", folder, parts, label_names=TONES)
    parts = {f"fold{n}": lambda n=n: tones(9, n) for n in range(3)}
    writer.write("folds", folder, parts, label_names=TONES)
    writer.write("singles", folder, {"train": lambda: tones(3, 0)}, label_names=TONES)
    return folder


def small(data_dir, **changes):
    config = configuration.finetune()
    config.init_from = str(GOLDEN / "tiny_patch.pt")
    config.epochs, config.batch_size, config.max_frames, config.log_every = 3, 8, 64, 1
    config.num_frames = 48
    config.optimizer.learning_rate = 2e-3
    config.schedule.name = "constant"  # the length of a run is then not part of what is compiled
    config.data.update(dir=str(data_dir), train="tones", valid="tones", test="tones@test")
    config.mesh.data = 1
    config.update(changes)
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_dir):
    """The workdir of a finished run of `small`, its evaluation, and what it printed."""
    workdir, printed = tmp_path_factory.mktemp("finished"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        found = finetune(small(data_dir), workdir)
    return workdir, found[""]["tones_test"], printed.getvalue()


def test_it_learns_and_leaves_what_it_promises(finished):
    workdir, evaluation, said = finished
    assert evaluation.num_examples == 11 and evaluation.value > 0.8
    for fact in ("3 layers of 64, patch tokens", "3: high, low, noise", "tones: 24 clips",
                 "tones@test: 11 clips", "9 of 8 clips, 3 epochs", "accuracy"):  # fmt: skip
        assert fact in said
    folder = workdir / "tones_test"
    with (folder / "predictions.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert sorted(row["id"] for row in rows) == sorted(f"2-{index}" for index in range(11))
    right = np.mean([row["label"] == row["prediction"] for row in rows])
    assert right == pytest.approx(evaluation.value)
    assert json.loads((folder / "results.json").read_text())["value"] == evaluation.value
    assert (folder / "confusion.png").stat().st_size > 1000
    (start,) = json.loads((workdir / "environment.json").read_text())
    sizes = {name: kept["clips"] for name, kept in start["data"].items()}
    assert sizes == {f"tones/1.0.0@{s}": n for s, n in (("train", 24), ("valid", 9), ("test", 11))}
    steps = [row["step"] for row in metrics_writer.read_metrics(workdir) if row["split"] == "eval"]
    assert steps == [3, 6, 9]


def test_the_fine_tuned_encoder_loads_embeds_and_is_exported(tmp_path, data_dir):
    config = small(data_dir, total_steps=1)
    config.head.layer = "0"
    finetune(config, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "encoder.safetensors")
    waves = np.stack([next(tones(1, 0))[1][:3_000]])
    before, model, exported = (
        maeast_jax.load(path)
        for path in (GOLDEN / "tiny_patch.pt", tmp_path / "run", tmp_path / "encoder.safetensors")
    )
    assert model.config.is_encoder_only
    a, b, c = (m.encode(waves).hidden_states for m in (before, model, exported))
    assert b.shape == (1, *a.shape[1:]) and np.any(a[:1] != b)
    np.testing.assert_array_equal(b, c)


def test_an_exported_classifier_gives_the_runs_probabilities(finished, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from benchmarks import reference

    workdir, _, _ = finished
    export(workdir, tmp_path / "folder")
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "| tones/1.0.0@train | 24 |" in card and "| tones/1.0.0@valid | 9 |" in card
    assert "It started from `tests/golden/tiny_patch.pt`" in card
    with reference.without_torchaudio():
        from transformers import AutoFeatureExtractor, pipeline

        AutoFeatureExtractor.from_pretrained(tmp_path / "folder", trust_remote_code=True)
    classify = pipeline(
        "audio-classification", str(tmp_path / "folder"), trust_remote_code=True, device="cpu"
    )
    with (workdir / "tones_test" / "predictions.tsv").open() as file:
        rows = {row["id"]: row for row in csv.DictReader(file, delimiter="\t")}
    for name, samples, _ in tones(11, 2):
        best, *_ = classify({"raw": np.float32(samples) / 32_768, "sampling_rate": 16_000})
        assert best["label"] == rows[name]["prediction"]
        assert best["score"] == pytest.approx(float(rows[name]["probability"]), abs=1e-5)


def final(folder):
    found = checkpoint.find(folder)
    return [checkpoint.load_part(found, name) for name in ("weights", "progress")]


def test_a_run_stopped_while_it_evaluates_goes_on_to_the_same_end(
    tmp_path, data_dir, finished, monkeypatch
):
    seen = []

    def interrupt(self, state, asked_to_stop):
        seen.append(int(state.step))
        if seen[-1] == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, state, asked_to_stop)

    evaluate = FoldTrainer.evaluate
    monkeypatch.setattr(FoldTrainer, "evaluate", interrupt)
    with pytest.raises(Interrupted):
        finetune(small(data_dir), tmp_path)
    assert seen == [3, 6]
    finetune(small(data_dir), tmp_path)
    assert seen == [3, 6, 9]
    jax.tree.map(np.testing.assert_array_equal, final(tmp_path), final(finished[0]))


@pytest.mark.slow
def test_any_mesh_trains_the_same_also_with_an_average_of_balanced_epochs(tmp_path, data_dir):
    found = []
    for mesh in ({"data": 1}, {"data": 2, "fsdp": 2, "tensor": 2}):
        config = small(data_dir, total_steps=3, eval_every=1, select="average", average_from=2)
        config.data.balanced = True
        # With the rate at 0 in the end, rounding moves the last weights little.
        config.schedule.name = "cosine"
        config.mesh.update(mesh)
        folder = tmp_path / f"{len(mesh)}"
        finetune(config, folder)
        progress = checkpoint.load_part(checkpoint.find(folder), "progress")
        assert progress["chosen_count"] == 2 and progress["step"] == 3
        found.append(final(folder))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), *found)


def test_a_loss_that_is_not_finite_is_neither_scored_nor_saved(tmp_path, data_dir):
    config = small(data_dir, log_every=100)
    config.optimizer.learning_rate = 1e30
    with pytest.raises(
        NonFiniteError, match=r"(loss|grad_norm) is (nan|inf) at step 2 \(no .*; lower"
    ):
        finetune(config, tmp_path)
    assert not [row for row in metrics_writer.read_metrics(tmp_path) if row["split"] == "eval"]
    assert checkpoint.saved_steps(tmp_path) == []


def test_a_run_goes_on_with_other_settings_but_not_with_another_model(
    tmp_path, data_dir, finished, capsys
):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    config = small(data_dir)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for path, value, message in (
        ("head.kind", "superb", "has head.kind='ssast', the configuration 'superb'; choose"),
        ("head.layer", "weighted", "has head.layer='last', the configuration 'weighted'"),
        ("optimizer.learning_rate", 0.5, "has optimizer.learning_rate=0.002, the configuration"),
        ("seed", 1, "has seed=0, the configuration 1"),  # it draws other clips to hold out
        ("init_from", "", r"started from .*tiny_patch.pt, and initial values, as it is now, is"),
    ):
        other = copy.deepcopy(config)
        with other.unlocked():
            other.update_from_flattened_dict({path: value})
        with pytest.raises(ValueError, match=message):
            finetune(other, tmp_path)
    assert all(path.read_bytes() == content for path, content in before.items())
    config.epochs = 2
    with pytest.raises(ValueError, match="has reached step 9, past the 6 steps of this run"):
        finetune(config, tmp_path)
    config.epochs = 4
    finetune(config, tmp_path)
    said = capsys.readouterr().out
    assert "resuming with other settings than before: epochs 3 -> 4" in said
    assert "resumed at step 9 of 12" in said


def rename(tones, **names):
    """The same clips, with other labels in place of some."""
    return lambda: ((i, samples, names.get(label, label)) for i, samples, label in tones())


def test_a_run_does_not_go_on_with_a_set_that_was_built_anew(tmp_path, data_dir, finished):
    """The head's outputs are numbers: with moved labels its scores would be those of chance."""
    workdir, other = shutil.copytree(finished[0], tmp_path / "run"), tmp_path / "data"
    train, valid, test = (
        lambda c=c, s=s: tones(c, s) for c, s in ((24, 0), (9, 1), (11, 2))
    )  # those of data_dir
    results = workdir / "tones_test" / "results.json"
    before = results.read_bytes()
    config = small(other)
    for parts, names, message in (
        (
            [rename(part, low="zebra") for part in (train, valid, test)],
            ["high", "zebra", "noise"],
            r"classes of tones are not those of the run in .* \(gone: low; new: zebra\); choose",
        ),
        ((train, valid, test), [*TONES, "rare"], r"\(gone: none; new: rare\)"),
        ((test, valid, train), TONES, r"tones/1.0.0@train was built anew .*: 24 clips .*, 11 now"),
        ((lambda: tones(24, 7), valid, test), TONES, r"built anew since: 24 clips then, 24 now"),
    ):
        writer.write(
            "tones", other, dict(zip(("train", "valid", "test"), parts, strict=True)),
            label_names=names, overwrite=True,
        )  # fmt: skip
        with pytest.raises(checkpoint.CheckpointError, match=message):
            finetune(config, workdir)
        assert results.read_bytes() == before
    # The same clips in another place, and other clips to test on, are no other run.
    parts = {"train": train, "valid": valid, "test": valid}
    writer.write("tones", other, parts, label_names=TONES, overwrite=True)
    assert finetune(config, workdir)[""]["tones_test"].num_examples == 9


@pytest.mark.parametrize("mode", ["linear", "knn"])
def test_probes_look_at_frozen_features_that_are_computed_once(tmp_path, data_dir, mode, capsys):
    config = small(data_dir, mode=mode)
    first = finetune(config, tmp_path)[""]["tones_test"]
    assert first.value > 0.8 and "replacing" not in capsys.readouterr().out
    cached = {path: path.stat().st_mtime_ns for path in (tmp_path / "features").iterdir()}
    assert len(cached) == 3
    second = finetune(config, tmp_path)[""]["tones_test"]
    assert second.value == first.value
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "features").iterdir()} == cached
    config.features.layer = "0"
    capsys.readouterr()
    finetune(config, tmp_path)
    said = capsys.readouterr().out
    assert "replacing the results of other settings: features.layer 'last' -> '0'\n" in said
    assert len(list((tmp_path / "features").iterdir())) == 6


def test_an_encoder_at_its_initial_values_and_plain_moments_are_there_to_compare(
    tmp_path, data_dir
):
    config = small(data_dir, mode="linear", init_from="")
    config.model.update(encoder_layers=2, width=32, heads=2, mlp_width=32, decoder_width=32)
    assert finetune(config, tmp_path)[""]["tones_test"].value > 0.5
    config.features.source = "fbank"
    assert finetune(config, tmp_path)[""]["tones_test"].value > 0.8


def test_each_fold_is_tested_once_by_a_model_that_has_not_seen_it(tmp_path, data_dir, capsys):
    config = small(data_dir, mode="linear")
    config.data.update(train="folds", valid="", test="", folds="fold0+fold1+fold2")
    config.data.valid_percent = 20.0
    found = finetune(config, tmp_path)
    assert list(found) == ["fold0", "fold1", "fold2"]
    for fold in found:
        assert maeast_jax.load_classifier(tmp_path / fold).class_names == tuple(TONES)
    with pytest.raises(ValueError, match=r"holds a classifier per fold; name one of .*/fold0, "):
        maeast_jax.load_classifier(tmp_path)
    run = open_run(config, tmp_path)
    for sets in run.folds:
        seen = {
            clip.id for part in (sets.train, sets.valid) for clip in part.read(range(len(part)))
        }
        (tested,) = sets.tests
        held_out = {clip.id for clip in tested.read(range(9))}
        assert len(seen) == 18 and len(held_out) == 9 and not seen & held_out
        assert held_out == {f"{sets.name[-1]}-{index}" for index in range(9)}
    assert "±" in capsys.readouterr().out


def test_one_fold_is_refused(tmp_path, data_dir):
    config = small(data_dir)
    config.data.update(train="folds", valid="", test="", folds="fold0")
    with pytest.raises(ValueError, match=r"data.folds='fold0' must name two splits at least"):
        open_run(config, tmp_path)


def test_a_test_on_the_validation_clips_is_said_to_be_one(tmp_path, data_dir, capsys):
    config = small(data_dir, mode="linear")
    config.data.test = ""
    found = finetune(config, tmp_path)
    assert found[""]["tones"].num_examples == 9
    (line,) = json.loads((tmp_path / "tones" / "results.json").read_text())["warnings"]
    assert line == (
        "9 of the 9 test clips of 'tones' are validation clips too, on which settings are chosen: "
        "for a fair score name other clips"
    )
    said = capsys.readouterr().out
    assert said.index(line) < said.index("chosen on validation")


def test_warnings_are_said_of_the_folds_that_they_are_about(tmp_path, data_dir, capsys):
    config = small(data_dir, mode="linear")
    config.features.source = "fbank"
    config.data.update(train="folds", valid="folds@fold0[:4]", test="", folds="fold0+fold1")
    finetune(config, tmp_path)
    warnings = {
        fold: json.loads((tmp_path / fold / f"folds_{fold}" / "results.json").read_text())[
            "warnings"
        ]
        for fold in ("fold0", "fold1")
    }
    said = capsys.readouterr().out
    for fold, use, other in (("fold0", "9 test", "validation"), ("fold1", "4 validation", "train")):
        (line,) = (line for line in warnings[fold] if "clips too" in line)
        assert line.startswith("4 of the ") and f"{use} clips" in line and other in line
        assert said.index(f"fold {fold}: {line}") < said.index(f"\nfold {fold}\n")


def test_a_share_of_the_labels_is_trained_on(tmp_path, data_dir):
    config = small(data_dir)
    config.data.train_percent = 25.0
    run = open_run(config, tmp_path)
    assert (len(run.folds[0].train), len(run.folds[0].valid)) == (6, 9)


def test_of_one_clip_a_class_none_is_held_out(tmp_path, data_dir):
    config = small(data_dir)
    config.data.update(train="singles", valid="", test="tones@test")
    with pytest.raises(ValueError, match=r"'singles' has one recording per class.* data.valid"):
        open_run(config, tmp_path)
    config.data.train = "singles,tones@train[:1]"
    (sets,) = open_run(config, tmp_path).folds
    assert (len(sets.train), len(sets.valid)) == (3, 1)


def test_the_architecture_is_the_checkpoints_and_that_is_said(tmp_path, data_dir, capsys):
    config = small(data_dir)
    config.model.update(width=384, dropout=0.3)
    model = open_run(config, tmp_path).config.model
    assert (model.width, model.encoder_layers, model.dropout) == (64, 3, 0.3)
    said = capsys.readouterr().out
    assert "tiny_patch.pt: " in said and "model.encoder_layers 12 -> 3" in said
    assert "model.width 384 -> 64" in said and "decoder" not in said


def test_evaluations_are_by_epoch_or_by_step():
    assert evaluations(9, 3.0) == (3, 6, 9)
    assert evaluations(10, 3.0) == (3, 6, 9, 10)
    assert evaluations(8, 2.75) == (3, 6, 8)
    assert evaluations(2, 5.0) == (2,)
    assert evaluations(7, 2.25) == (3, 5, 7)  # of three epochs the third ends within the last step


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("mode", "train", "config.mode='train' is unknown; known: finetune, linear, knn"),
        ("select", "first", "config.select='first' is unknown; known: best, last, average"),
        ("init_from", "nowhere", "nowhere does not exist"),
        ("head.layer", "7", "head.layer='7' is not one of the model's 3"),
        ("data.train", "", "data.train is empty: name a labelled data set"),
        ("data.train", "nothing", "no data set 'nothing'"),
        (
            "data.train",
            "tones@train[:1]",
            r"all 1 training clips of 'tones@train\[:1\]' have the class '\w+', so there is",
        ),
        ("data.test", "tones@train*3", r"data.test='tones@train\*3' has weights, .* drop"),
        ("data.train_percent", 0.0, r"data.train_percent=0.0 must be in \(0, 100\]"),
        ("data.folds", "a+b", "data.test='tones@test' has no meaning with data.folds='a\\+b'"),
        ("average_from", 0, "config.average_from=0 must be at least 1"),
        ("average_from", 4, "average_from=4 must not be past the 3 evaluations of 9 steps; lower"),
        (
            "schedule.warmup_steps",
            9,
            "schedule.warmup_steps=9 must be below the 9 steps of the run",
        ),
        ("num_frames", 15, "config.num_frames=15 must be at least 16, the frames of a patch token"),
        ("accumulation_steps", 0, "config.accumulation_steps=0 must be at least 1"),
        ("accumulation_steps", 3, r"batch_size=8 must be a multiple of 3, .*accumulation_steps"),
        ("seed", -1, "config.seed=-1 must not be negative"),
        ("data.threads", -1, "data.threads=-1 must not be negative"),
        ("mesh.data", 9, r"mesh.data=9, .* needs 9 devices, but there are 8"),
        ("mesh.data", 3, r"batch_size=8 must be a multiple of 3, mesh.data x mesh.fsdp \(3\)"),
        ("mesh.tensor", 3, "mesh.tensor=3 does not divide"),
        ("features.source", "wave", "features.source='wave' is unknown; known: encoder, fbank"),
        ("features.pool", "none", "features.pool='none' is unknown; known: mean, time, moments"),
        ("features.phases", 0, "features.phases=0 must be at least 1"),
        (
            "features.layer",
            "all",
            "features.layer='all' is not one of the model's 3; known: last, 0 to 2, -3 to -1",
        ),
        ("normalize.mean", -4.2, "normalize.deviation=0.0 must be above 0"),
        ("normalize.deviation", -1.0, "normalize.deviation=-1.0 must be above 0"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_written(tmp_path, data_dir, path, value, message):
    config = small(data_dir, select="average")
    section, _, name = path.rpartition(".")
    (config[section] if section else config)[name] = value
    with pytest.raises(ValueError, match=message) as error:
        finetune(config, tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_what_fails_in_computing_features_does_not_make_the_workdir_its_modes(
    tmp_path, data_dir, monkeypatch
):
    def broken(_):
        raise ValueError("the weights cannot be read")

    monkeypatch.setattr("maeast_jax.finetune.Features", broken)
    with pytest.raises(ValueError, match="the weights cannot be read"):
        finetune(small(data_dir, mode="linear"), tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_a_workdir_that_cannot_be_written_is_one_line(tmp_path, data_dir):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"written \(Not a directory\); choose another --workdir"):
        finetune(small(data_dir), tmp_path / "file" / "run")


def test_a_workdir_on_an_object_store_is_refused(data_dir):
    with pytest.raises(ValueError, match=r"gs://bucket/run must be on this machine"):
        finetune(small(data_dir), "gs://bucket/run")


def test_the_workdir_of_a_pretraining_run_is_refused_and_left_as_it_is(tmp_path, data_dir):
    checkpoint.write_config(tmp_path, pretrain().to_dict())
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(ValueError, match="holds a run of pretraining, not of finetune; ") as no:
        finetune(small(data_dir), tmp_path)
    assert f"--config.init_from={tmp_path} starts from its weights" in str(no.value)
    assert (tmp_path / "config.json").read_text() == before


def test_the_workdir_of_another_mode_is_refused_and_left_as_it_is(data_dir, finished):
    workdir = finished[0]
    before = (workdir / "config.json").read_text()
    with pytest.raises(ValueError, match="holds a run of finetune, not of linear; choose another"):
        finetune(small(data_dir, mode="linear"), workdir)
    with pytest.raises(ValueError, match="holds a run of finetune, not of pretraining; choose"):
        train(tiny.short_config(), workdir)
    assert (workdir / "config.json").read_text() == before


def test_batches_of_any_length_hold_a_token(tmp_path, data_dir):
    config = small(data_dir, num_frames=0, max_frames=15)
    with pytest.raises(ValueError, match=r"config\.max_frames=15 must be at least 16, the frames"):
        finetune(config, tmp_path / "run")
