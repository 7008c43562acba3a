import re

import numpy as np
import pytest
import soundfile
from recordings import build, digests, noise, records, touch, visible, write_wav

from maeast_jax.data import DataError, dataset

pytest.importorskip("tensorflow_datasets")


@pytest.fixture(scope="module")
def farm(tmp_path_factory):
    """Twelve files in two folders."""
    root = tmp_path_factory.mktemp("farm")
    for seed in range(12):
        write_wav(root / ("cow", "crow")[seed % 2] / f"{seed}.wav", 0.1 + 0.01 * seed, seed)
    return root


def test_a_folder_becomes_a_data_set_whatever_the_number_of_processes(farm, tmp_path, capsys):
    directory = build(audio_dir=farm, data_dir=tmp_path, label_from_folder=True, num_processes=2)
    assert directory == tmp_path / "farm" / "1.0.0"
    train, valid = records(tmp_path, "train"), records(tmp_path, "valid")
    both = train | valid
    assert len(train) + len(valid) == len(both) == 12
    assert 1 <= len(valid) < len(train)
    for seed in range(12):
        label = ("cow", "crow")[seed % 2]
        samples, found = both[f"{label}/{seed}.wav"]
        np.testing.assert_array_equal(samples, noise(0.1 + 0.01 * seed, seed))
        assert found == label
    assert (directory / "skipped.tsv").read_text() == "path\treason\n"
    assert (directory / "remarks.tsv").read_text() == "path\tremark\n"
    told = capsys.readouterr()
    assert "remarks.tsv" not in told.out
    assert f"12 files from {farm} to {tmp_path / 'farm'}, 2 processes" in told.out
    assert re.search(rf"train +{len(train)} +{len(train)} +0\.00", told.out)
    assert "2 labels: cow, crow" in told.out
    assert "python -m maeast_jax.train --config=configs/pretrain_small.py" in told.out
    assert told.out.endswith(
        "  python -m maeast_jax.finetune --config=configs/finetune_folder.py"
        f" --workdir=runs/farm_labels --config.init_from=CKPT --config.data.dir={tmp_path}"
        " --config.data.train=farm --config.data.valid=farm\n"
    )
    assert "12/12" in told.err
    before, arguments = digests(directory), {"audio_dir": farm, "label_from_folder": True}
    with pytest.raises(DataError, match="--overwrite"):
        build(data_dir=tmp_path, **arguments)
    assert digests(build(data_dir=tmp_path, overwrite=True, **arguments)) == before


def test_a_manifest_with_labels_splits_and_files_that_fail(tmp_path, capsys):
    for seed in range(4):
        write_wav(tmp_path / "in" / f"{seed}.wav", 0.2, seed)
    write_wav(tmp_path / "in" / "short.wav", 0.05)
    (tmp_path / "in" / "broken.wav").write_bytes(b"RIFF of no kind")
    (tmp_path / "list.tsv").write_text(
        "label\tsplit\tpath\ncow\ttrain\t0.wav\ncrow\ttest\t1.wav\ncow\ttest\tbroken.wav\n"
        "cow\ttrain\t2.wav\ncrow\ttrain\t3.wav\nant\ttrain\tabsent.wav\ncow\ttrain\tshort.wav\n"
    )
    directory = build(
        manifest=tmp_path / "list.tsv", audio_dir=tmp_path / "in", data_dir=tmp_path,
        min_seconds=0.1, max_skipped_percent=30,
    )  # fmt: skip
    assert {name: label for name, (_, label) in records(tmp_path, "train").items()} == {
        "0.wav": "cow", "2.wav": "cow", "3.wav": "crow",
    }  # fmt: skip
    assert list(records(tmp_path, "test")) == ["1.wav"]
    header, *skipped = (directory / "skipped.tsv").read_text().splitlines()
    assert header == "path\treason"
    assert skipped[0] == "absent.wav\tnot found"
    assert re.fullmatch(r"broken.wav\tPyAV: .+; soundfile: .+", skipped[1])
    assert skipped[2:] == ["short.wav\t0.05 s, shorter than --min_seconds"]
    assert "skipped 2 unreadable files, 1 too short" in capsys.readouterr().out


def test_remarks_are_counted_by_kind_and_listed(tmp_path, capsys):
    folder = tmp_path / "in"
    write_wav(folder / "a.wav", 0.5)
    tone = np.sin(np.arange(40_000, dtype=np.float32))
    for name, peak in (("b", 3), ("c", 2)):
        soundfile.write(folder / f"{name}.wav", peak * tone, 16_000, subtype="FLOAT")
    out_of_phase = np.stack([tone, -tone], 1) / 2
    soundfile.write(folder / "d.wav", out_of_phase, 16_000)
    half_silent = np.concatenate([tone[:16_000] / 2, np.zeros(32_000)])
    soundfile.write(folder / "e.wav", half_silent, 16_000)
    directory = build(audio_dir=folder, data_dir=tmp_path, piece_seconds=1, valid_percent=0)
    assert (directory / "remarks.tsv").read_text() == (
        "path\tremark\n"
        "b.wav\tbeyond full scale: scaled down from a peak of 3\n"
        "b.wav\tlast piece too short: 0.50 s left out\n"
        "c.wav\tbeyond full scale: scaled down from a peak of 2\n"
        "c.wav\tlast piece too short: 0.50 s left out\n"
        "d.wav\tchannels cancel: channel 1 alone\n"
        "d.wav\tlast piece too short: 0.50 s left out\n"
        "e.wav#0001\tno sound\ne.wav#0002\tno sound\n"
    )
    assert (
        "\nbeyond full scale: 2, e.g. b.wav: scaled down from a peak of 3"
        "\nchannels cancel: 1, e.g. d.wav: channel 1 alone"
        "\nlast piece too short: 3, e.g. b.wav: 0.50 s left out"
        "\nno sound: 2, e.g. e.wav#0001"
        f"\nthe whole list: {directory / 'remarks.tsv'}\n"
    ) in capsys.readouterr().out
    heard = records(tmp_path, "train")
    np.testing.assert_allclose(heard["d.wav#0000"][0], 16_384 * tone[:16_000], atol=2)


def test_a_manifest_with_several_labels_per_file(farm, tmp_path, capsys):
    (tmp_path / "list.tsv").write_text(
        "path\tlabels\ncow/0.wav\tmoo\ncrow/1.wav\tcaw;moo; bark\ncow/2.wav\t\n"
    )
    build(manifest=tmp_path / "list.tsv", audio_dir=farm, data_dir=tmp_path, valid_percent=0)
    split = dataset.open_split("farm", "train", tmp_path)
    assert (split.is_multi_label, split.label_names) == (True, ("bark", "caw", "moo"))
    labels = {record["id"]: record["label"].tolist() for record in split.read(range(3))}
    assert labels == {"cow/0.wav": [2], "crow/1.wav": [0, 1, 2], "cow/2.wav": []}
    assert "3 labels, any number of them per clip: bark, caw, moo\n" in capsys.readouterr().out


def test_splits_that_folders_name_are_kept_apart_and_what_is_left_out_is_told(tmp_path, capsys):
    for seed, name in enumerate(["Train/cow/0.wav", "Train/crow/1.wav", "test/cow/2.wav"]):
        write_wav(tmp_path / "in" / name, 0.1, seed)
    touch(tmp_path / "in", "Train/words.txt")
    build(audio_dir=tmp_path / "in", data_dir=tmp_path, label_from_folder=True)
    found = {split: records(tmp_path, split) for split in ("train", "test")}
    assert {split: {name: label for name, (_, label) in clips.items()}
            for split, clips in found.items()} == {
        "train": {"Train/cow/0.wav": "cow", "Train/crow/1.wav": "crow"},
        "test": {"test/cow/2.wav": "cow"},
    }  # fmt: skip
    told = capsys.readouterr().out
    assert (
        "left out by their names: 1 .txt\n"
        "splits are taken from the folders Train, test\n"
        "split names: Train is train\n"
    ) in told
    assert "--config.data.train=farm --config.data.test=farm@test\n" in told


def test_too_many_broken_files_fail_the_build_and_are_listed(farm, tmp_path):
    listed = [*(f"cow/{seed}.wav" for seed in (0, 2, 4, 6, 8)), "gone.wav", "away.wav"]
    (tmp_path / "list.tsv").write_text("\n".join(["path", *listed]))
    arguments = {
        "manifest": tmp_path / "list.tsv", "audio_dir": farm, "data_dir": tmp_path / "data",
        "valid_percent": 0,
    }  # fmt: skip
    with pytest.raises(DataError) as caught:
        build(**arguments, max_skipped_percent=15)
    assert "2 of the first 7 files (of 7) cannot be read" in str(caught.value)
    assert "gone.wav: not found" in str(caught.value)
    assert visible(tmp_path / "data") == ["farm.skipped.tsv"]
    listing = (tmp_path / "data" / "farm.skipped.tsv").read_text()
    assert listing == "path\treason\naway.wav\tnot found\ngone.wav\tnot found\n"
    build(**arguments, max_skipped_percent=29)
    assert len(records(tmp_path / "data", "train")) == 5
    assert visible(tmp_path / "data") == ["farm"]


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ({"audio_dir": None}, "no source: pass --audio_dir"),
        ({"audio_dir": "none"}, "--audio_dir=none is not a directory"),
        ({"manifest": "none.tsv", "label_from_folder": True}, "goes with --audio_dir alone"),
        ({"name": "My-Farm"}, "'My-Farm': expected lower snake case"),
        ({"layout": "esc50", "manifest": "x.tsv"}, "--layout=esc50 has lists of its own"),
        ({"layout": "esc50", "label_from_folder": True}, "goes with --audio_dir alone"),
        ({"test_dir": "x"}, "--test_dir goes with --layout=speech_commands_v1 alone"),
        ({"data_dir": "gs://farm"}, "--data_dir=gs://farm goes with Beam alone: add"),
        (
            {"num_processes": 2, "beam_pipeline_options": "direct"},
            "--num_processes=2 goes without --beam_pipeline_options: drop it",
        ),
    ],
)
def test_bad_options_are_one_line_and_nothing_is_written(
    farm, tmp_path, monkeypatch, arguments, pattern
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as caught:
        build(**{"audio_dir": farm, "data_dir": tmp_path / "data"} | arguments)
    assert pattern in str(caught.value)
    assert "\n" not in str(caught.value)
    assert visible(tmp_path) == []


def test_a_split_without_a_clip_fails_the_build(tmp_path):
    for seed in range(4):
        write_wav(tmp_path / "in" / f"{seed}.wav", 0.05 if seed == 3 else 0.2, seed)
    rows = [f"in/{seed}.wav\t{'valid' if seed == 3 else 'train'}" for seed in range(4)]
    (tmp_path / "list.tsv").write_text("\n".join(["path\tsplit", *rows]))
    with pytest.raises(DataError, match=r"split 'valid' has no examples.*--valid_percent=0"):
        build(manifest=tmp_path / "list.tsv", data_dir=tmp_path / "data", min_seconds=0.1)
    assert visible(tmp_path / "data") == []
