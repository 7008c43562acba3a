import os
import re
from pathlib import Path

import numpy as np
import pytest
from recordings import digests, noise, records, write_wav

from maeast_jax.build_dataset import build
from maeast_jax.data import audio, dataset
from maeast_jax.ingest import sources

pytest.importorskip("tensorflow_datasets")
decode = audio._decode


@pytest.fixture(scope="module")
def farm(tmp_path_factory):
    """Twelve files in two folders."""
    root = tmp_path_factory.mktemp("farm")
    for seed in range(12):
        write_wav(root / ("cow", "crow")[seed % 2] / f"{seed}.wav", 0.1 + 0.01 * seed, seed)
    return root


def test_a_folder_becomes_a_data_set(farm, tmp_path, capsys):
    directory = build(
        audio_dir=farm, data_dir=tmp_path, name="farm", label_from_folder=True, num_processes=2
    )
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
    told = capsys.readouterr()
    assert f"12 files from {farm} to {tmp_path / 'farm'}, 2 processes" in told.out
    assert re.search(rf"train +{len(train)} +{len(train)} +0\.00", told.out)
    assert "2 labels: cow, crow" in told.out
    assert (
        "python -m maeast_jax.train --config=configs/pretrain_small.py --workdir=runs/farm"
        f" --config.data.dir={tmp_path} --config.data.train=farm --config.data.eval=farm"
    ) in told.out
    assert told.out.endswith(
        "  python -m maeast_jax.finetune --config=configs/finetune_folder.py"
        f" --workdir=runs/farm_labels --config.init_from=CKPT --config.data.dir={tmp_path}"
        " --config.data.train=farm --config.data.valid=farm\n"
    )
    assert "12/12" in told.err
    assert "file/s" in told.err


def test_the_number_of_processes_changes_nothing(farm, tmp_path):
    made = [
        build(audio_dir=farm, data_dir=tmp_path / str(number), name="farm", num_processes=number)
        for number in (1, 3)
    ]
    assert digests(made[0]) == digests(made[1])


def test_long_files_are_cut_and_all_pieces_fall_on_one_side(tmp_path):
    for seed, seconds in enumerate([5.0, 4.5, 6.0, 2.0, 0.5, 1.9]):
        write_wav(tmp_path / "in" / f"{seed}.wav", seconds, seed)
    build(
        audio_dir=tmp_path / "in", data_dir=tmp_path, name="farm", piece_seconds=2,
        valid_percent=40, num_processes=1,
    )  # fmt: skip
    train, valid = records(tmp_path, "train"), records(tmp_path, "valid")
    assert not {name.split("#")[0] for name in train} & {name.split("#")[0] for name in valid}
    clips = {name: samples for name, (samples, _) in (train | valid).items()}
    seconds = {name: len(samples) / 16_000 for name, samples in clips.items()}
    assert seconds == {
        "0.wav#0000": 2, "0.wav#0001": 2, "0.wav#0002": 1,
        "1.wav#0000": 2, "1.wav#0001": 2,  # and half a second dropped
        "2.wav#0000": 2, "2.wav#0001": 2, "2.wav#0002": 2,
        "3.wav": 2, "4.wav": 0.5, "5.wav": 1.9,
    }  # fmt: skip
    np.testing.assert_array_equal(clips["0.wav#0001"], noise(5, 0)[32_000:64_000])


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
        manifest=tmp_path / "list.tsv", audio_dir=tmp_path / "in", data_dir=tmp_path, name="farm",
        min_seconds=0.1, max_skipped_percent=30, num_processes=1,
    )  # fmt: skip
    assert {name: label for name, (_, label) in records(tmp_path, "train").items()} == {
        "0.wav": "cow", "2.wav": "cow", "3.wav": "crow",
    }  # fmt: skip
    assert list(records(tmp_path, "test")) == ["1.wav"]
    header, *skipped = (directory / "skipped.tsv").read_text().splitlines()
    assert header == "path\treason"
    assert [line.split("\t")[0] for line in skipped] == ["absent.wav", "broken.wav", "short.wav"]
    assert skipped[0] == "absent.wav\tnot found"
    assert re.fullmatch(r"broken.wav\tsoundfile: .+; PyAV: .+", skipped[1])
    assert skipped[2] == "short.wav\t0.05 s, shorter than --min_seconds"
    told = capsys.readouterr().out
    assert "skipped 2 unreadable files, 1 too short" in told


def decode_or_die(path):
    """What a process runs in place of `audio._decode`."""
    return os._exit(1) if path.endswith("cow/4.wav") else decode(path)


def test_a_file_that_kills_its_decoder_is_skipped(farm, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(audio, "_decode", decode_or_die)
    directory = build(audio_dir=farm, data_dir=tmp_path, name="farm", valid_percent=0,
                      max_skipped_percent=10, num_processes=2)  # fmt: skip
    assert set(records(tmp_path, "train")) == {
        f"{('cow', 'crow')[seed % 2]}/{seed}.wav" for seed in range(12) if seed != 4
    }
    reason = "its decoder died (crashed, or out of memory)"
    assert (directory / "skipped.tsv").read_text() == f"path\treason\ncow/4.wav\t{reason}\n"
    assert "skipped 1 unreadable files" in capsys.readouterr().out


def test_a_manifest_with_several_labels_a_file(farm, tmp_path, capsys):
    (tmp_path / "list.tsv").write_text(
        "path\tlabels\ncow/0.wav\tmoo\ncrow/1.wav\tcaw;moo; bark\ncow/2.wav\t\n"
    )
    build(manifest=tmp_path / "list.tsv", audio_dir=farm, data_dir=tmp_path, name="farm",
          valid_percent=0, num_processes=1)  # fmt: skip
    split = dataset.open_split("farm", "train", tmp_path)
    assert (split.is_multi_label, split.label_names) == (True, ("bark", "caw", "moo"))
    labels = {record["id"]: record["label"].tolist() for record in split.read(range(3))}
    assert labels == {"cow/0.wav": [2], "crow/1.wav": [0, 1, 2], "cow/2.wav": []}
    assert "3 labels, any number of them a clip: bark, caw, moo\n" in capsys.readouterr().out


def test_fairseq_manifests(farm, tmp_path):
    (tmp_path / "train.tsv").write_text(f"{farm}\ncow/0.wav\t1600\ncrow/1.wav\t9\n")
    build(manifest=tmp_path / "train.tsv", data_dir=tmp_path, name="farm", valid_percent=0,
          num_processes=1)  # fmt: skip
    assert sorted(records(tmp_path, "train")) == ["cow/0.wav", "crow/1.wav"]


def test_too_many_broken_files_fail_the_build_and_are_listed(farm, tmp_path):
    listed = [*(f"cow/{seed}.wav" for seed in (0, 2, 4, 6, 8)), "gone.wav", "away.wav"]
    (tmp_path / "list.tsv").write_text("\n".join(["path", *listed]))
    arguments = {
        "manifest": tmp_path / "list.tsv", "audio_dir": farm, "data_dir": tmp_path / "data",
        "name": "farm", "valid_percent": 0, "num_processes": 1,
    }  # fmt: skip
    with pytest.raises(dataset.DataError) as caught:
        build(**arguments, max_skipped_percent=15)
    assert "2 of the first 7 files (of 7) cannot be read" in str(caught.value)
    assert "gone.wav: not found" in str(caught.value)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["farm.skipped.tsv"]
    listing = (tmp_path / "data" / "farm.skipped.tsv").read_text()
    assert listing == "path\treason\naway.wav\tnot found\ngone.wav\tnot found\n"
    build(**arguments, max_skipped_percent=29)
    assert len(records(tmp_path / "data", "train")) == 5
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["farm"]


def test_overwriting(farm, tmp_path):
    build(audio_dir=farm, data_dir=tmp_path, name="farm", num_processes=1)
    before = digests(tmp_path / "farm" / "1.0.0")
    with pytest.raises(dataset.DataError, match="--overwrite"):
        build(audio_dir=farm / "cow", data_dir=tmp_path, name="farm")
    assert digests(tmp_path / "farm" / "1.0.0") == before
    build(audio_dir=farm / "cow", data_dir=tmp_path, name="farm", overwrite=True, num_processes=1)
    assert len(records(tmp_path, "train") | records(tmp_path, "valid")) == 6


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ({"audio_dir": None}, "no source: pass --audio_dir"),
        ({"audio_dir": "none"}, "--audio_dir=none is not a directory"),
        ({"manifest": "none.tsv"}, "cannot read --manifest=none.tsv"),
        ({"manifest": "none.tsv", "label_from_folder": True}, "goes with --audio_dir alone"),
        ({"name": "My-Farm"}, "'My-Farm': expected lower snake case"),
        ({"valid_percent": 100}, "--valid_percent=100"),
        ({"valid_percent": -1}, "--valid_percent=-1"),
        ({"valid_percent": float("nan")}, "--valid_percent=nan"),
        ({"max_skipped_percent": 101}, "--max_skipped_percent=101"),
        ({"piece_seconds": 0.5}, "--piece_seconds=0.5"),
        ({"piece_seconds": -3}, "--piece_seconds=-3"),
        ({"min_seconds": -1}, "--min_seconds=-1"),
        ({"min_seconds": 31}, "--min_seconds=31"),
        ({"num_processes": 0}, "--num_processes=0"),
        ({"layout": "esc"}, "--layout=esc is unknown; known: audioset, esc50"),
        ({"layout": "esc50"}, "esc50.csv, which --layout=esc50 needs"),
        ({"layout": "esc50", "manifest": "x.tsv"}, "--layout=esc50 goes with --audio_dir alone"),
        ({"layout": "esc50", "label_from_folder": True}, "goes with --audio_dir alone"),
        ({"layout": "esc50", "audio_dir": None}, "no source: pass --audio_dir"),
        ({"layout": "esc50", "audio_dir": None, "manifest": "x.tsv"}, "with --audio_dir alone"),
        ({"test_dir": "x"}, "--test_dir goes with --layout=speech_commands_v1 alone"),
        ({"data_dir": "gs://farm"}, "--data_dir=gs://farm goes with Beam alone: add"),
        ({"data_dir": "file/below"}, "cannot write to data directory file/below (Not a directory)"),
    ],
)
def test_bad_input_is_told_before_anything_is_written(
    farm, tmp_path, monkeypatch, arguments, pattern
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises((sources.ManifestError, dataset.DataError)) as caught:
        build(**{"audio_dir": farm, "data_dir": tmp_path / "data", "name": "farm"} | arguments)
    assert pattern in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_no_clip_left(tmp_path):
    write_wav(tmp_path / "in" / "a.wav", 0.1)
    with pytest.raises(dataset.DataError, match="split 'train' has no examples"):
        build(audio_dir=tmp_path / "in", data_dir=tmp_path / "data", name="farm", min_seconds=1)
    assert not list((tmp_path / "data").iterdir())


@pytest.mark.parametrize("fault", ["unreadable", "too short"])
def test_a_held_out_split_without_a_clip_is_left_out(tmp_path, capsys, fault):
    for seed in range(6):
        write_wav(tmp_path / "in" / f"{seed}.wav", 0.2, seed)
    listed = sources.assign_splits(sources.list_folder(tmp_path / "in"), 30)
    held_out = [Path(file.path) for file in listed if file.split == "valid"]
    assert 1 <= len(held_out) <= 3
    for path in held_out:
        write_wav(path, 0.05)
        if fault == "unreadable":
            path.write_bytes(b"RIFF of no kind")
    arguments = {"data_dir": tmp_path, "min_seconds": 0.1, "max_skipped_percent": 50,
                 "num_processes": 1}  # fmt: skip
    directory = build(audio_dir=tmp_path / "in", name="farm", valid_percent=30, **arguments)
    assert sorted(path.name for path in directory.glob("*.array_record*")) == [
        "farm-train.array_record-00000-of-00001"
    ]
    assert len(records(tmp_path, "train")) == 6 - len(held_out)
    told = capsys.readouterr().out
    assert f"split valid is left out: none of its {len(held_out)} files gave a clip\n" in told
    assert told.endswith(" --config.data.train=farm\n")
    skipped = (directory / "skipped.tsv").read_text()
    assert all(f"{path.name}\t" in skipped for path in held_out)

    # A split that somebody has asked for does not go without a word.
    rows = "".join(f"in/{Path(file.path).name}\t{file.split}\n" for file in listed)
    (tmp_path / "list.tsv").write_text("path\tsplit\n" + rows)
    with pytest.raises(dataset.DataError, match="split 'valid' has no examples"):
        build(manifest=tmp_path / "list.tsv", name="named", **arguments)
