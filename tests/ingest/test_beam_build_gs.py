"""Data sets built on Beam with recordings, tasks and shards on gs://, against a stand-in for it."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_gcs
import numpy as np
import pytest
from recordings import digests, records, write_wav
from test_beam_build_program import wait_for_group

from maeast_jax.build_dataset import build
from maeast_jax.data import dataset
from maeast_jax.ingest import beam, beam_runner, shard_file, shard_plan
from maeast_jax.runtime import bucket

pytest.importorskip("tensorflow_datasets")
pytest.importorskip("apache_beam")

HERE = "direct_running_mode=in_memory"  # where what a test puts in place of a function is seen
SHARD_BYTES = 1_000  # one of each file
write_shard = shard_file.write_shard


@pytest.fixture(scope="module")
def store():
    with fake_gcs.standing_in("bucket") as server:
        yield server


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shard_plan, "_SHARD_BYTES", SHARD_BYTES)


@pytest.fixture(scope="module")
def farm(store, tmp_path_factory):
    """Recordings with a list, on this machine and in gs://bucket/farm; one file is broken."""
    root = tmp_path_factory.mktemp("farm")
    rows = ["path\tlabel\tsplit"]
    for seed in range(12):
        label = ("cow", "crow")[seed % 2]
        write_wav(root / label / f"{seed}.wav", 0.1 + 0.01 * seed, seed)
        rows.append(f"{label}/{seed}.wav\t{label}\t{'train' if seed < 9 else 'test'}")
    (root / "cow" / "broken.wav").write_bytes(b"RIFF of no kind")
    (root / "list.tsv").write_text("\r\n".join([*rows, "cow/broken.wav\tcow\ttrain"]))
    full = [rows[0], *(f"gs://bucket/farm/{row}" for row in rows[1:])]
    (root / "full.tsv").write_text(
        "\n".join([*full, "gs://bucket/farm/cow/broken.wav\tcow\ttrain"])
    )
    for file in root.rglob("*.*"):
        store.put("bucket", f"farm/{file.relative_to(root)}", file.read_bytes())
    store.put("bucket", "farm/.hidden/a.wav", b"")
    return root


@pytest.fixture(scope="module")
def local(farm, tmp_path_factory):
    """What a build on this machine's disk gives."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_plan, "_SHARD_BYTES", SHARD_BYTES)
        return digests(build_list(farm / "list.tsv", tmp_path_factory.mktemp("local")))


def build_list(manifest, data_dir, options=HERE, **changes):
    arguments = {
        "manifest": manifest, "data_dir": data_dir, "name": "farm", "max_skipped_percent": 10,
        "beam_pipeline_options": options,
    }  # fmt: skip
    return build(**arguments | changes)


def below(store, folder):
    """Objects below gs://bucket/`folder`, which must not be seen by anyone else: name -> bytes."""
    return {
        name.removeprefix(f"{folder}/"): store.buckets["bucket"][name][0]
        for name in store.names("bucket")
        if name.startswith(f"{folder}/")
    }


def told(store, folder, tmp_path):
    """`digests` of a data set that is all there is in `folder`."""
    for name, data in below(store, folder).items():
        home, file = name.rsplit("/", 1)
        assert home == "farm/1.0.0"
        (tmp_path / file).write_bytes(data)
    return digests(tmp_path)


def test_the_same_bytes_as_on_a_disk(store, farm, local, tmp_path, capsys):
    before = len(store.written)
    two = "direct_num_workers=2"
    made = build_list("gs://bucket/farm/list.tsv", "gs://bucket/data", two)
    assert str(made) == "gs://bucket/data/farm/1.0.0"
    assert sum(".array_record-" in name for name in local) == 13
    assert told(store, "data", tmp_path) == local
    written = store.written[before:]
    assert written[-1] == "bucket/data/farm/1.0.0/dataset_info.json"
    shard = "farm-train.array_record-00000-of-00010"
    assert [name for name in written if name.endswith(shard)] == [
        f"bucket/data/farm.partial/{next(iter(plans(written)))}/shards/{shard}",
        f"bucket/data/farm/1.0.0/{shard}",
    ]
    out, errors = capsys.readouterr()
    assert "files from gs://bucket/farm/list.tsv to gs://bucket/data/farm, Beam's Direct" in out
    assert "--config.data.dir=gs://bucket/data " in out
    assert "13/13" in errors
    found = dataset.open_split("farm", "train", "gs://bucket/data")
    assert len(found) == 9
    (tmp_path / "read" / "farm").mkdir(parents=True)
    tmp_path = tmp_path / "read"
    (tmp_path / "farm" / "1.0.0").symlink_to(tmp_path.parent)
    wanted = records(tmp_path, "train")
    for record in found.read(range(9)):
        np.testing.assert_array_equal(record["audio"], wanted[record["id"]][0])


def plans(written):
    return {name.split("/")[3] for name in written if "/farm.partial/" in name}


@pytest.mark.parametrize(
    ("manifest", "audio_dir"),
    [
        ("list.tsv", "gs://bucket/farm"),
        ("full.tsv", "gs://bucket/farm"),
        ("gs://bucket/farm/full.tsv", None),
    ],
)
def test_a_list_here_or_there_of_recordings_there(
    store, farm, local, tmp_path, manifest, audio_dir
):
    """To a folder, where the only thing on gs:// is what is read."""
    manifest = manifest if "://" in manifest else farm / manifest
    assert digests(build_list(manifest, tmp_path, audio_dir=audio_dir)) == local


def test_a_folder_there_with_and_without_beam(store, farm, tmp_path):
    arguments = {"manifest": None, "label_from_folder": True}
    expected = build_list(audio_dir=farm, data_dir=tmp_path / "disk", **arguments)
    arguments["audio_dir"] = "gs://bucket/farm/"
    assert digests(build_list(data_dir=tmp_path / "beam", **arguments)) == digests(expected)
    build_list(data_dir=tmp_path / "plain", options=None, num_processes=1, **arguments)
    found, wanted = (records(tmp_path / where, "train") for where in ("plain", "disk"))
    assert found.keys() == wanted.keys()
    for name, (samples, label) in wanted.items():
        np.testing.assert_array_equal(found[name][0], samples)
        assert found[name][1] == label


def test_a_build_that_failed_goes_on_with_the_shards_that_are_missing(
    store, farm, local, tmp_path, monkeypatch, capsys
):
    calls = itertools.count()

    def fail_at_the_sixth(path, *rest):
        if next(calls) == 5:
            path.write_bytes(b"half a shard")
            raise OSError(28, "No space left on device")
        return write_shard(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(shard_file, "write_shard", fail_at_the_sixth)
        with pytest.raises(beam.BeamError, match="5 of 13 shards are done: the same command"):
            build_list("gs://bucket/farm/list.tsv", "gs://bucket/failed")
    with pytest.raises(dataset.NotPreparedError):
        dataset.open_split("farm", "train", "gs://bucket/failed")
    before = len(store.written)
    capsys.readouterr()
    build_list("gs://bucket/farm/list.tsv", "gs://bucket/failed")
    assert "\n13 shards, 5 of them done before\n" in capsys.readouterr().out
    built = [
        name for name in store.written[before:] if "partial" in name and "/shards/farm-" in name
    ]
    assert len(built) == 8
    assert told(store, "failed", tmp_path) == local


def test_publishing_that_failed_leaves_no_set_that_opens_and_is_made_up_for(
    store, farm, local, tmp_path, monkeypatch
):
    copy = bucket.copy

    def fail_before_the_last(names, targets):
        copy(names[:4], targets[:4])
        raise ConnectionError("reset")

    build_list(farm / "list.tsv", "gs://bucket/cut", min_seconds=0.15)
    with monkeypatch.context() as patch:
        patch.setattr(bucket, "copy", fail_before_the_last)
        with pytest.raises(ValueError, match=r"written \(reset\); the same command goes on"):
            build_list(farm / "list.tsv", "gs://bucket/cut", overwrite=True)
    assert len([name for name in below(store, "cut") if name.startswith("farm/1.0.0/")]) == 4
    with pytest.raises(dataset.NotPreparedError):
        dataset.open_split("farm", "train", "gs://bucket/cut")
    monkeypatch.setattr(beam_runner, "run", None)  # nothing is left for it
    build_list(farm / "list.tsv", "gs://bucket/cut")
    assert told(store, "cut", tmp_path) == local
    with pytest.raises(dataset.DataError, match="--overwrite to replace"):
        build_list(farm / "list.tsv", "gs://bucket/cut")


def test_recordings_that_cannot_be_fetched_are_tried_again(store, farm, local, tmp_path, capsys):
    store.broken |= {f"bucket/farm/cow/{seed}.wav" for seed in (2, 4)}
    arguments = ("gs://bucket/farm/list.tsv", "gs://bucket/outage")
    with pytest.raises(dataset.DataError, match=r"3 of the first 13 files .* cannot be read"):
        build_list(*arguments)
    listed = below(store, "outage")["farm.skipped.tsv"].decode()
    assert "\ncow/4.wav\tcannot be fetched: Forbidden: " in listed
    store.broken.remove("bucket/farm/cow/4.wav")
    capsys.readouterr()
    build_list(*arguments, max_skipped_percent=20)
    assert "\n13 shards, 11 of them done before\n" in capsys.readouterr().out
    skipped = below(store, "outage")["farm/1.0.0/skipped.tsv"].decode().splitlines()
    assert [line.split("\t")[0] for line in skipped] == ["path", "cow/2.wav", "cow/broken.wav"]
    store.broken.clear()
    build_list(*arguments, overwrite=True)
    assert told(store, "outage", tmp_path) == local


def test_other_recordings_of_the_same_names_are_another_build(store, farm, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(beam_runner, "run", lambda *arguments: None)
        with pytest.raises(beam.BeamError, match="workers wrote elsewhere; 0 of 13 shards"):
            build_list("gs://bucket/farm/list.tsv", "gs://bucket/other")
    (left,) = plans(f"bucket/other/{name}" for name in below(store, "other"))
    name = "farm/crow/1.wav"
    store.put("bucket", name, store.buckets["bucket"][name][0])
    build_list("gs://bucket/farm/list.tsv", "gs://bucket/other")
    assert f"gs://bucket/other/farm.partial/{left}, of other files or" in capsys.readouterr().out
    assert not [name for name in below(store, "other") if "partial" in name]


PROGRAM = f"""
from maeast_jax import build_dataset
from maeast_jax.ingest import shard_file, shard_plan
from maeast_jax.runtime import cli
shard_plan._SHARD_BYTES = {SHARD_BYTES}
build_dataset._define_flags()
cli.run_flags(build_dataset.main, required=("data_dir", "name"))
"""


def start_build(store, data_dir, *words):
    environment = os.environ | store.environment
    del environment["EPATH_USE_TF"]  # the program's own affair
    words = [
        sys.executable, "-c", PROGRAM, "--manifest=gs://bucket/farm/list.tsv", "--name=farm",
        f"--data_dir={data_dir}", "--max_skipped_percent=10", *words,
    ]  # fmt: skip
    return subprocess.Popen(
        words, cwd=Path(beam.__file__).parents[2], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def test_killed_it_goes_on_where_it_was(store, farm, local, tmp_path):
    words = (store, "gs://bucket/killed", "--beam_pipeline_options=direct_num_workers=2")
    process = start_build(*words)
    while not any("/tallies/" in name for name in below(store, "killed")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    out, _ = process.communicate(timeout=60)
    assert "\n13 shards\n" in out
    wait_for_group(process.pid)
    done = len([name for name in below(store, "killed") if "/tallies/" in name])
    assert 0 < done < 13
    with pytest.raises(dataset.NotPreparedError):
        dataset.open_split("farm", "train", "gs://bucket/killed")
    out, errors = start_build(*words).communicate(timeout=120)
    assert f"\n13 shards, {done} of them done before\n" in out, errors
    assert told(store, "killed", tmp_path) == local


def test_without_beam_a_bucket_is_refused_in_one_line(store, farm):
    process = start_build(store, "gs://bucket/plain")
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert errors == (
        "error: --data_dir=gs://bucket/plain goes with Beam alone: add"
        " --beam_pipeline_options=direct, or build in a folder and copy it there\n"
    )


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ({"manifest": None, "audio_dir": "gs://bucket/f", "layout": "esc50"}, "without --layout"),
        ({"manifest": None, "audio_dir": "gs://bucket/none"}, "none is not a directory: check the"),
        ({"manifest": None, "audio_dir": "gs://bucket/data"}, "no audio file below gs://bucket/da"),
        (
            {"manifest": "gs://bucket/none.tsv"},
            r"bucket/none.tsv cannot be read \(not found\); check the",
        ),
        ({"data_dir": "s3://bucket/data"}, "s3://bucket/data is unknown: name a folder of this"),
        ({"data_dir": "gs://nowhere/a"}, r"gs://nowhere/a cannot be written \(404 .* --data_dir$"),
    ],
)
def test_what_is_wrong_with_a_place_is_one_line(store, farm, arguments, pattern):
    before = len(store.written)
    with pytest.raises(ValueError, match=pattern) as caught:
        build_list(**{"manifest": farm / "list.tsv", "data_dir": "gs://bucket/wrong", **arguments})
    assert "\n" not in str(caught.value)
    assert len(store.written) == before
