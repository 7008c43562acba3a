"""Data sets built on Apache Beam's direct runner, beside those built without it."""

import itertools
import os
import re
from pathlib import Path

import numpy as np
import pytest
from recordings import digests, records, write_wav

from maeast_jax.build_dataset import build
from maeast_jax.data import audio, dataset, staging
from maeast_jax.ingest import beam, beam_runner, shard_file, shard_plan, sources
from maeast_jax.ingest.examples import Cut

pytest.importorskip("tensorflow_datasets")
pytest.importorskip("apache_beam")

HERE = "direct_running_mode=in_memory"  # where what a test puts in place of a function is seen
decode = audio._decode
write_shard = shard_file.write_shard


@pytest.fixture(scope="module")
def farm(tmp_path_factory):
    """Twelve files of two labels, and a list of them with two that fail and one that is cut."""
    root = tmp_path_factory.mktemp("farm")
    rows = []
    for seed in range(12):
        name = f"{('cow', 'crow')[seed % 2]}/{seed}.wav"
        write_wav(root / name, 2.6 if seed == 5 else 0.1 + 0.01 * seed, seed)
        rows.append((name, ("cow", "crow")[seed % 2], "train" if seed < 9 else "test"))
    (root / "broken.wav").write_bytes(b"RIFF of no kind")
    write_wav(root / "short.wav", 0.02)
    rows += [("broken.wav", "cow", "train"), ("short.wav", "crow", "test")]
    lines = ["\t".join(row) for row in [("path", "label", "split"), *rows]]
    (root / "list.tsv").write_text("\n".join(lines))
    (root / "backwards.tsv").write_text("\n".join(lines[:1] + lines[:0:-1]))
    rows = [f"{name}\t{';'.join({label, 'animal'})}" for name, label, _ in rows[:12]]
    (root / "labels.tsv").write_text("\n".join(["path\tlabels", *rows]))
    return root


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shard_plan, "_SHARD_BYTES", 10_000)


def build_list(farm, data_dir, options=HERE, name="list", **changes):
    arguments = {
        "manifest": farm / f"{name}.tsv", "data_dir": data_dir, "name": "farm", "piece_seconds": 1,
        "min_seconds": 0.05, "max_skipped_percent": 10, "beam_pipeline_options": options,
    }  # fmt: skip
    return build(**arguments | changes)


def without_shards(directory):
    """The files of a data set but for its shards, and what it says of their lengths."""
    texts = {
        path.name: path.read_text()
        for path in directory.iterdir()
        if ".array_record-" not in path.name
    }
    info = texts["dataset_info.json"]
    texts["dataset_info.json"] = re.sub(r'"shardLengths": \[[^]]*\]', "", info)
    return texts


def test_the_same_data_set_as_without_beam(farm, tmp_path, capsys):
    made = build_list(farm, tmp_path / "beam")
    told = capsys.readouterr()
    plain = build_list(farm, tmp_path / "plain", options=None, num_processes=1)
    expected = capsys.readouterr()
    for split, count in (("train", 10), ("test", 3)):
        found, wanted = (records(tmp_path / which, split) for which in ("beam", "plain"))
        assert len(found) == count
        assert found.keys() == wanted.keys()
        for name, (samples, label) in wanted.items():
            np.testing.assert_array_equal(found[name][0], samples)
            assert found[name][1] == label
    assert without_shards(made) == without_shards(plain)
    assert "broken.wav\tsoundfile: " in (made / "skipped.tsv").read_text()
    assert "short.wav\t0.02 s, shorter than" in (made / "skipped.tsv").read_text()
    names = {path.name for path in made.iterdir()}
    assert {f"farm-train.array_record-{index:05d}-of-00010" for index in range(10)} <= names
    assert [path.name for path in (tmp_path / "beam").iterdir()] == ["farm"]
    assert told.out.startswith(
        f"14 files from {farm / 'list.tsv'} to {tmp_path / 'beam' / 'farm'}, Beam's DirectRunner"
        " (in_memory, 1 workers)\n13 shards\n"
    )
    assert "14/14" in told.err
    # The table, what was skipped, the labels and the next commands.
    assert told.out[told.out.index("       split") :] == expected.out[
        expected.out.index("       split") :
    ].replace(f"{tmp_path}/plain", f"{tmp_path}/beam")


def test_a_shard_that_is_done_is_not_built_again(farm, tmp_path):
    files = sources.list_folder(farm / "cow")
    plan = shard_plan.Plan.of(
        shard_file.Schema("farm", None, False), tmp_path, {"train": files}, Cut(0.0, 0.0)
    )
    plan.open()
    task = str(plan.shards[0].task_path)
    with audio.DecodePool(1) as pool:
        beam.build_shard(task, pool)
    before = os.stat(plan.shards[0].path)
    beam.build_shard(task, None)  # as a runner may that loses sight of a worker
    assert os.stat(plan.shards[0].path) == before


def test_several_labels_a_clip(farm, tmp_path):
    build_list(farm, tmp_path, name="labels")
    split = dataset.open_split("farm", "train+valid", tmp_path)
    assert (split.is_multi_label, split.label_names) == (True, ("animal", "cow", "crow"))
    labels = {record["id"]: record["label"].tolist() for record in split.read(range(len(split)))}
    assert (labels["cow/0.wav"], labels["crow/3.wav"]) == ([0, 1], [0, 2])


def test_the_same_bytes_whoever_builds_them_from_whatever_list(farm, tmp_path, monkeypatch):
    expected = digests(build_list(farm, tmp_path / "here"))
    assert len(expected) > 12
    monkeypatch.chdir(farm)
    two = "runner=DirectRunner,direct_num_workers=2"
    made = build_list(Path(), Path(os.path.relpath(tmp_path / "two")), two, name="backwards")
    assert digests(made) == expected


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_build_that_failed_goes_on_with_the_shards_that_are_missing(
    farm, tmp_path, monkeypatch, capsys, overwrite
):
    expected = digests(build_list(farm, tmp_path / "whole"))
    if overwrite:
        build(audio_dir=farm / "cow", data_dir=tmp_path, name="farm", num_processes=1)
        before = digests(tmp_path / "farm" / "1.0.0")
    calls = itertools.count()

    def fail_at_the_sixth(path, *rest):
        if next(calls) == 5:
            path.write_bytes(b"half a shard")
            raise OSError(28, "No space left on device")
        return write_shard(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(shard_file, "write_shard", fail_at_the_sixth)
        with pytest.raises(beam.BeamError) as caught:
            build_list(farm, tmp_path, overwrite=overwrite)
    assert str(caught.value) == (
        "Beam's pipeline failed: OSError: [Errno 28] No space left on device [while running"
        " 'ParDo(Work)']; 5 of 13 shards are done: the same command builds the others"
    )
    if overwrite:
        assert digests(tmp_path / "farm" / "1.0.0") == before
    else:
        with pytest.raises(dataset.NotPreparedError):
            dataset.open_split("farm", "train", tmp_path)
    (folder,) = (tmp_path / "farm.partial").iterdir()
    done = {path.name: path.stat().st_ino for path in (folder / "shards").iterdir()}
    assert len(done) == 5
    capsys.readouterr()
    calls = itertools.count()
    made = build_list(farm, tmp_path, overwrite=overwrite)
    assert "\n13 shards, 5 of them done before\n" in capsys.readouterr().out
    assert {name: (made / name).stat().st_ino for name in done} == done
    assert digests(made) == expected
    assert not (tmp_path / "farm.partial").exists()


def test_too_many_broken_files_cost_no_work(farm, tmp_path, monkeypatch):
    with pytest.raises(dataset.DataError) as caught:
        build_list(farm, tmp_path, max_skipped_percent=5)
    assert "1 of the first 14 files (of 14) cannot be read, more than" in str(caught.value)
    assert "broken.wav" in (tmp_path / "farm.skipped.tsv").read_text()
    assert not (tmp_path / "farm").exists()
    monkeypatch.setattr(beam_runner, "run", None)  # nothing is left for it
    build_list(farm, tmp_path, max_skipped_percent=10)
    assert len(records(tmp_path, "train")) == 10
    assert [path.name for path in tmp_path.iterdir()] == ["farm"]


def test_other_flags_take_nothing_from_a_build_that_was_left(farm, tmp_path, capsys):
    with pytest.raises(dataset.DataError):
        build_list(farm, tmp_path, max_skipped_percent=5)
    (left,) = (tmp_path / "farm.partial").iterdir()
    capsys.readouterr()
    made = build_list(farm, tmp_path, piece_seconds=0)
    told = capsys.readouterr().out
    assert f"\n{left}, of other files or flags, will be removed when this build is done\n" in told
    assert "\n13 shards\n" in told
    assert len(records(tmp_path, "train")["crow/5.wav"][0]) == 41_600
    assert digests(made) == digests(build_list(farm, tmp_path / "alone", piece_seconds=0))
    assert [path.name for path in tmp_path.iterdir() if path.name != "alone"] == ["farm"]


def test_an_existing_set_is_replaced_on_demand(farm, tmp_path):
    made = build_list(farm, tmp_path)
    before = digests(made)
    with pytest.raises(dataset.DataError, match="--overwrite"):
        build_list(farm, tmp_path, min_seconds=0)
    assert digests(made) == before
    build_list(farm, tmp_path, min_seconds=0, overwrite=True)
    assert len(records(tmp_path, "test")) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["farm"]


def decode_or_die(path):
    """What a pool's process runs in place of `audio._decode`."""
    return os._exit(1) if path.endswith("cow/4.wav") else decode(path)


def test_a_file_that_kills_its_decoder_is_skipped(farm, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(audio, "_decode", decode_or_die)
    directory = build_list(farm, tmp_path, max_skipped_percent=15)
    assert "cow/4.wav" not in records(tmp_path, "train")
    assert len(records(tmp_path, "train")) == 9
    reason = "its decoder died (crashed, or out of memory)"
    assert f"\ncow/4.wav\t{reason}\n" in (directory / "skipped.tsv").read_text()
    assert "skipped 2 unreadable files" in capsys.readouterr().out


def test_an_id_that_two_shards_use(tmp_path):
    write_wav(tmp_path / "a.wav", 2.5)
    write_wav(tmp_path / "b.wav", 0.1)
    (tmp_path / "b.wav").rename(tmp_path / "a.wav#0001")
    (tmp_path / "list.tsv").write_text("path\na.wav\na.wav#0001\n")
    with pytest.raises(dataset.DataError, match=r"id 'a.wav#0001' is used twice: ids must be"):
        build_list(tmp_path, tmp_path, valid_percent=0)
    assert not (tmp_path / "farm").exists()


def test_a_split_without_a_clip(tmp_path, capsys):
    for seed in range(6):
        write_wav(tmp_path / "in" / f"{seed}.wav", 0.2, seed)
    listed = sources.assign_splits(sources.list_folder(tmp_path / "in"), 30)
    for file in listed:
        if file.split == "valid":
            write_wav(Path(file.path), 0.02)
    arguments = {
        "data_dir": tmp_path, "min_seconds": 0.1, "valid_percent": 30, "beam_pipeline_options": HERE
    }  # fmt: skip
    directory = build(audio_dir=tmp_path / "in", name="farm", **arguments)
    assert not list(directory.glob("farm-valid*"))
    assert "split valid is left out" in capsys.readouterr().out
    with pytest.raises(dataset.DataError, match="valid"):
        dataset.open_split("farm", "valid", tmp_path)

    # A split that somebody has asked for does not go without a word, nor do all.
    rows = "".join(f"in/{Path(file.path).name}\t{file.split}\n" for file in listed)
    (tmp_path / "list.tsv").write_text("path\tsplit\n" + rows)
    with pytest.raises(dataset.DataError, match="split 'valid' has no examples"):
        build(manifest=tmp_path / "list.tsv", name="named", **arguments)
    with pytest.raises(dataset.DataError, match="no split of train, valid has examples"):
        build(audio_dir=tmp_path / "in", name="none", **arguments | {"min_seconds": 1})
    assert not (tmp_path / "named").exists()
    assert not (tmp_path / "none").exists()


def test_workers_that_write_elsewhere(farm, tmp_path, monkeypatch):
    monkeypatch.setattr(beam_runner, "run", lambda *arguments: None)
    with pytest.raises(beam.BeamError) as caught:
        build_list(farm, tmp_path)
    assert "ended, but its workers wrote elsewhere; 0 of 13 shards are done" in str(caught.value)
    assert not (tmp_path / "farm").exists()


def test_one_build_of_a_name_at_a_time(farm, tmp_path):
    with (
        staging.locked(tmp_path / "farm" / "1.0.0", wait=False),
        pytest.raises(dataset.DataError, match="another process is building"),
    ):
        build_list(farm, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ({"num_processes": 2}, "--num_processes=2 goes without --beam_pipeline_options: drop it"),
        ({"beam_pipeline_options": "runner=Bogus"}, "Unexpected pipeline runner: Bogus"),
    ],
)
def test_bad_flags_are_told_before_anything_is_written(farm, tmp_path, arguments, pattern):
    with pytest.raises(sources.ManifestError) as caught:
        build_list(farm, tmp_path / "data", **arguments)
    assert pattern in str(caught.value)
    assert not (tmp_path / "data").exists()
