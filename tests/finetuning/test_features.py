"""Features of probes: whose they are, as what they were computed of changes under its name."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from recordings import TONES, tones

from maeast_jax import config as configuration
from maeast_jax.data import labelled, writer
from maeast_jax.finetuning import Features, features, open_run

pytest.importorskip("tensorflow_datasets")

GOLDEN = Path(__file__).parents[1] / "golden"


def write(folder, seed, names=TONES, name="tones", **options):
    splits = {"train": lambda: tones(9, seed)}
    writer.write(name, folder, splits, label_names=names, **options)


def features_of(workdir, data_dir, source="fbank", train="tones", **changes):
    """Of the clips of `tones`, as a run of these settings has them: array, truth, ids."""
    config = configuration.finetune()
    config.mode, config.max_frames, config.mesh.data = "linear", 64, 1
    config.data.update(dir=str(data_dir), train=train, valid="tones@train")
    config.features.update(source=source, phases=1)
    config.model.update(encoder_layers=1, width=16, heads=2, mlp_width=16, decoder_width=16)
    config.update(changes)
    run = open_run(config, workdir)
    return Features(run).of(run.folds[0].valid)


def test_a_set_that_was_built_anew_or_lies_elsewhere_gives_its_own(tmp_path):
    write(tmp_path / "data", 0)
    first, _, ids = features_of(tmp_path / "run", tmp_path / "data")
    write(tmp_path / "data", 1, overwrite=True)
    anew, _, anew_ids = features_of(tmp_path / "run", tmp_path / "data")
    assert ids != anew_ids and np.any(first != anew)
    write(tmp_path / "elsewhere", 2)
    _, _, elsewhere_ids = features_of(tmp_path / "run", tmp_path / "elsewhere")
    assert {name[0] for name in elsewhere_ids} == {"2"}


def test_another_order_of_the_classes_gives_other_labels(tmp_path):
    write(tmp_path / "data", 0)
    _, truth, ids = features_of(tmp_path / "run", tmp_path / "data")
    write(tmp_path / "data", 0, TONES[::-1], overwrite=True)
    _, reverse, again = features_of(tmp_path / "run", tmp_path / "data")
    assert ids == again
    np.testing.assert_array_equal(reverse, 2 - truth)


def test_another_checkpoint_under_the_same_path_gives_its_own(tmp_path):
    torch = pytest.importorskip("torch")
    write(tmp_path / "data", 0)
    path = tmp_path / "model.pt"
    shutil.copy(GOLDEN / "tiny_patch.pt", path)
    changes = {"source": "encoder", "init_from": str(path)}
    first, *_ = features_of(tmp_path / "run", tmp_path / "data", **changes)
    saved = torch.load(path, weights_only=True)
    saved["model"]["encoder.layers.0.fc1.weight"] *= 0.5
    torch.save(saved, path)
    second, *_ = features_of(tmp_path / "run", tmp_path / "data", **changes)
    assert np.any(first != second)


def test_an_untrained_encoder_has_its_input_normalised_by_the_clips_trained_on(tmp_path):
    write(tmp_path / "data", 0)
    write(tmp_path / "data", 1, name="others")
    first, *_ = features_of(tmp_path / "run", tmp_path / "data", "encoder")
    second, *_ = features_of(tmp_path / "run", tmp_path / "data", "encoder", "others")
    assert np.any(first != second)


def test_statistics_are_of_the_clips_that_hold_sound(tmp_path):
    """Silence would pull the mean to the floor of -15.9, and a set of it has a deviation of 0."""

    def some(silent):
        for index, (name, samples, label) in enumerate(tones(9, 0)):
            yield name, samples * (index < 9 - silent), label
            yield f"short-{name}", samples[:399], label

    found = []
    for silent in (0, 3):
        writer.write(f"with_{silent}", tmp_path, {"train": lambda s=silent: some(s)}, TONES)
        opened = labelled.open_labelled(f"with_{silent}", "train", tmp_path)
        sound = opened.subset(np.flatnonzero(opened.has_sound))
        assert len(sound) == 9 - silent
        found.append(features.fbank_statistics(opened, 0))
        np.testing.assert_allclose(found[-1], features.fbank_statistics(sound, 0), rtol=1e-12)
    np.testing.assert_allclose(*found, rtol=0.2)
